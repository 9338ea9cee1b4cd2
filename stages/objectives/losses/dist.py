"""DIST: correlation instead of divergence, within rows and within columns of the batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import TeacherRows, centred, whole

_EPS = 1e-8


@loss("dist", reads_labels=False, ce_weight=1.0, weight=2.0, couples_rows=True)
def dist(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """T^2 (beta inter + gamma intra): Huang et al. 2022, arXiv 2205.10536.

    With p = softmax(z / T): inter = mean_i 1 - r(p_s[i, :], p_t[i, :]) over rows, intra =
    mean_c 1 - r(p_s[:, c], p_t[:, c]) over the columns of the batch, r Pearson's correlation.
    student_logits, teacher_logits: float (B, C). weights: float (B,), of the rows, 1 if None.
    Returns float32, (). T = 4 is their CIFAR-100 configuration.

    Rows are coupled by the columns, where the weights become those of a weighted correlation:
    inter = mean_i w_i (1 - r_i), and intra is multiplied by the mean weight. Rows of weight 0 are
    as if they were not in the batch; scaling all weights scales the loss.
    """
    teacher = F.softmax(centred(whole(teacher_logits, "dist", temperature)) / temperature, dim=1)
    student = F.softmax(centred(student_logits) / temperature, dim=1)
    if weights is None:
        weights = student.new_ones(len(student))
    inter = (weights * (1 - _pearson(student, teacher, torch.ones_like(student), 1))).mean()
    columns = _pearson(student, teacher, weights[:, None].expand_as(student), 0)
    intra = weights.mean() * (1 - columns).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Weighted correlation along a dimension. 0 where either side does not vary."""
    # To a largest weight of 1, next to which _EPS is as small whatever the scale of the weights.
    weights = weights / weights.amax(dim, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    total = weights.sum(dim, keepdim=True).clamp(min=_EPS)
    a, b = (x - (weights * x).sum(dim, keepdim=True) / total for x in (a, b))
    # The root goes inside: a norm has a gradient at 0, the root of a sum has none.
    a, b = weights.sqrt() * a, weights.sqrt() * b
    norms = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    correlation: Tensor = (a * b).sum(dim) / (norms[0] * norms[1] + _EPS)
    return correlation
