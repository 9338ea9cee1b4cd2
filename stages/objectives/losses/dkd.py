"""DKD and NKD: the label's class apart from all others."""

import torch.nn.functional as F
from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import (
    Reduction,
    TeacherRows,
    binary_kl,
    kl,
    one_and_rest,
    one_hot,
    paired,
    reduced,
    without,
)


@loss(
    "dkd",
    ce_weight=1.0,
    weight=1.0,
    warmup=20,
    reads=("temperature",),
    lskd={"temperature": 2.0, "weight": 9.0},
)
def dkd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): Zhao et al. 2022, arXiv 2203.08679, as in mdistiller.

    With b = [p(y), 1 - p(y)] at T, TCKD = KL(b_t || b_s), and NCKD is the KL of the distributions
    over the classes other than y. KD is the case alpha = 1, beta = 1 - p_t(y).
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows TCKD
    is exact.
    """
    student, teacher, classes = paired(student_logits, teacher_logits, labels, temperature)
    student, teacher = student / temperature, teacher / temperature
    tckd = binary_kl(one_and_rest(teacher, classes), one_and_rest(student, classes))
    label = one_hot(classes, student.shape[1])
    nckd = kl(without(teacher, label), without(student, label))
    return reduced(temperature**2 * (alpha * tckd + beta * nckd), reduction)


@loss("nkd", ce_weight=1.0, weight=1.0, reads=(1.0, "temperature"))
def nkd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 1.0,
    gamma: float = 1.5,
    reduction: Reduction = "mean",
) -> Tensor:
    """-p_t(y) log p_s(y) - gamma T^2 sum_c q_t(c) log q_s(c): Yang et al. 2023, arXiv 2303.13005.

    p at temperature 1; q = softmax over the classes other than y at T. Defaults of the released
    code (ImageNet); its CIFAR-100 configuration has T = 3, gamma = 3.5. A cross-entropy and no
    divergence: it is not 0 where student and teacher agree.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows the
    first term is exact.
    """
    student, teacher, classes = paired(student_logits, teacher_logits, labels, 1.0)
    (log_t, _), (log_s, _) = one_and_rest(teacher, classes), one_and_rest(student, classes)
    target = -log_t.exp() * log_s
    student, teacher, classes = paired(student_logits, teacher_logits, labels, temperature)
    label = one_hot(classes, student.shape[1])
    others_t = F.softmax(without(teacher / temperature, label), dim=1)
    others_s = F.log_softmax(without(student / temperature, label), dim=1)
    others = -(others_t * others_s.masked_fill(label, 0)).sum(1)
    return reduced(target + gamma * temperature**2 * others, reduction)
