"""TTM and WTTM: only the teacher is softened."""

import torch
from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import (
    Reduction,
    TeacherRows,
    beside,
    kl,
    paired,
    partial,
    reduced,
)


@loss("ttm", reads_labels=False, ce_weight=1.0, weight=45.0, reads=("temperature",))
def ttm(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 10.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s)): Zheng and Yang 2024, arXiv 2402.11148.

    The student stays at temperature 1 and there is no T^2. T = 1 / gamma in their notation; the
    default is their example for vgg13 -> vgg8 (gamma .1, weight 45).
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,).
    """
    _, teacher, _ = paired(student_logits, teacher_logits, labels, temperature)
    rows = kl(teacher / temperature, beside(student_logits, teacher_logits, 1.0))
    return reduced(rows, reduction)


@loss("wttm", reads_labels=False, ce_weight=1.0, weight=4.0, reads=(1.0, "temperature"))
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
    _, sharp, _ = paired(student_logits, teacher_logits, labels, 1.0)
    _, soft, _ = paired(student_logits, teacher_logits, labels, temperature)
    rows = kl(soft / temperature, beside(student_logits, teacher_logits, 1.0))
    # Rows known at 1 give U themselves. Only of partial ones the powers of the rest are asked for,
    # at T: their constants are the same at both temperatures.
    powers = soft if partial(teacher_logits) else sharp
    log_u = torch.logsumexp(powers / temperature, 1) - torch.logsumexp(sharp, 1) / temperature
    return reduced(log_u.exp() * rows, reduction)
