"""MLKD: a weak and a strong view of every sample, aligned by rows, by classes and by the batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.objectives.losses.rows import TeacherRows, kl, whole

TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


def mlkd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Jin, Wang, Lin 2023, "Multi-Level Logit Distillation" (CVPR), as its released code has it.

    student_logits, teacher_logits: float (2B, C): rows of the weak views, then rows of the strong
    views of the same samples. weights: float (2B,), of the rows, 1 if None. Returns float32, ().
    With P = softmax(z / T), for every T of 4, 3, 5, 2, 6:

        rows     T^2 mean_i KL(P_t[i] || P_s[i])         of the weak and of the strong views
        classes  sum (P_t' P_t - P_s' P_s)^2 / C         of the weak views
        batch    sum (P_t P_t' - P_s P_s')^2 / B         of the weak views

    The code differs from the paper, and is followed because the published numbers are its: its
    masks of the weak views (rows whose teacher is surer than the median, likewise classes) select
    nothing but multiply by the share of what they would keep, the strong row terms of T = 2 and 6
    read the weak views, and class and batch terms of the strong views are not added.

    Weights of rows: KL terms are mean_i w_i KL_i; in the products row i stands with sqrt(w_i), so
    that rows of weight 0 are as if they were not there.
    """
    weak_s, strong_s = student_logits.float().chunk(2)
    weak_t, strong_t = whole(teacher_logits, "mlkd", 1.0).chunk(2)
    ones = student_logits.new_ones(len(student_logits), dtype=torch.float32)
    weak_w, strong_w = (ones if weights is None else weights).chunk(2)
    confidence = weak_t.softmax(1)
    unsure = _share_below_median(confidence.amax(1))
    rare = _share_below_median(confidence.sum(0))
    total = student_logits.new_zeros((), dtype=torch.float32)
    for t in TEMPERATURES:
        weak = (weak_w * t**2 * kl(weak_t / t, weak_s / t)).mean()
        strong = (strong_w * t**2 * kl(strong_t / t, strong_s / t)).mean()
        total = total + unsure * weak + (strong if t in TEMPERATURES[:3] else weak)
        p_t, p_s = (weak_w.sqrt()[:, None] * F.softmax(z / t, dim=1) for z in (weak_t, weak_s))
        classes = (p_t.T @ p_t - p_s.T @ p_s).square().sum() / p_t.shape[1]
        batch = (p_t @ p_t.T - p_s @ p_s.T).square().sum() / len(p_t)
        total = total + rare * classes + unsure * batch
    return total


def _share_below_median(values: Tensor) -> Tensor:
    """The share of values that are at most the median, as numpy.percentile interpolates it."""
    return (values <= values.quantile(0.5)).float().mean()
