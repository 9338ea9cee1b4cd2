"""TTM and WTTM: only the teacher is softened."""

import torch
from torch import Tensor

from stages.objectives.losses.rows import Reduction, TeacherRows, kl, paired, reduced


def ttm(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 10.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s)): Zheng and Yang 2024, arXiv 2402.01911.

    The student stays at temperature 1 and there is no T^2. T = 1 / gamma in their notation; the
    default is their example for vgg13 -> vgg8 (gamma .1, weight 45).
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,).
    """
    return reduced(_rows(student_logits, teacher_logits, labels, temperature), reduction)


def wttm(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 5.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """U KL(softmax(z_t / T) || softmax(z_s)), U = sum_c p_t(c)^(1/T) with p_t at temperature 1.

    U is larger for rows about which the teacher is unsure. Source and defaults as `ttm` (their
    WTTM example: gamma .2, weight 4). Of partial rows U is exact.
    """
    rows = _rows(student_logits, teacher_logits, labels, temperature)
    soft, sharp = (
        torch.logsumexp(paired(student_logits, teacher_logits, labels, t)[1] / t, dim=1)
        for t in (temperature, 1.0)
    )
    return reduced((soft - sharp / temperature).exp() * rows, reduction)


def _rows(student_logits: Tensor, teacher: TeacherRows, labels: Tensor, t: float) -> Tensor:
    student, _, _ = paired(student_logits, teacher, labels, 1.0)
    _, softened, _ = paired(student_logits, teacher, labels, t)
    return kl(softened / t, student)
