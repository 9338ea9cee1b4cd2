"""ABKD: the alpha-beta divergence, between forward and reverse KL."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import Reduction, TeacherRows, paired, reduced


@loss("abkd", reads_labels=False, ce_weight=1.0, weight=32.0, reads=("temperature",))
def abkd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 0.8,
    beta: float = 0.3,
    reduction: Reduction = "mean",
) -> Tensor:
    """D(softmax(z_t / T) || softmax(z_s / T)): Wang et al. 2025, arXiv 2505.04560, without T^2.

        D(p || q) = sum_c (a p^(a+b) / (a+b) + b q^(a+b) / (a+b) - p^a q^b) / (a b)

    with a = alpha and b = beta, each at least 0. Where one is 0 it is the limit, of both
    sum_c (log p - log q)^2 / 2: alpha 1, beta 0 is KL, alpha 0, beta 1 its reverse. Defaults are
    the example of their README for resnet56 -> resnet20. Powers are taken of logarithms, so that a
    probability of 0 is no division by it.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows the
    rest is one class, as for `kd`.
    """
    student, teacher, _ = paired(student_logits, teacher_logits, labels, temperature)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    return reduced(_divergence(log_p, log_q, alpha, beta).sum(1), reduction)


def _divergence(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    """What each class adds to D(p || q): float32 (B, C)."""
    if a == 0 and b == 0:
        return (log_p - log_q).square() / 2
    if a == 0:  # the same from the other side
        return _limit(log_q, log_p, b)
    if b == 0:
        return _limit(log_p, log_q, a)
    both = a + b
    powers = a / both * (both * log_p).exp() + b / both * (both * log_q).exp()
    return (powers - (a * log_p + b * log_q).exp()) / (a * b)


def _limit(log_p: Tensor, log_q: Tensor, a: float) -> Tensor:
    """The divergence at beta = 0: p^a (log p - log q) - (p^a - q^a) / a."""
    p, q = (torch.exp(a * logs) for logs in (log_p, log_q))
    return p * (log_p - log_q) - (p - q) / a
