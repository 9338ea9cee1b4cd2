"""RLD: the teacher's confidence goes to the label, and no class above the label is copied."""

from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import (
    Reduction,
    TeacherRows,
    binary_kl,
    kl,
    one_and_rest,
    paired,
    partial,
    reduced,
    without,
)


@loss(
    "rld",
    ce_weight=1.0,
    weight=1.0,
    warmup=20,
    reads=("temperature", "sure_temperature"),
    lskd={"temperature": 2.0, "weight": 9.0},
)
def rld(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    sure_temperature: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """alpha Ta^2 SCD + beta T^2 MCD: Sun et al. 2024, arXiv 2408.07703, the released code.

    SCD = KL([max p_t, 1 - max p_t] || [p_s(y), 1 - p_s(y)]) at Ta = sure_temperature: the teacher's
    confidence against the student's in the label. None is T, as in the released command
    (`--same-t`); the released configuration alone has Ta = 1. MCD = KL of the distributions at T
    over the classes that the teacher has below the label; where there is none the row's is 0. Where
    the teacher is right and Ta = T this is DKD.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows SCD
    is exact, and MCD counts the rest as below the label.
    """
    t, ta = temperature, temperature if sure_temperature is None else sure_temperature
    student, teacher, classes = paired(student_logits, teacher_logits, labels, ta)
    confident = one_and_rest(teacher / ta, _most_confident(teacher_logits, teacher))
    scd = ta**2 * binary_kl(confident, one_and_rest(student / ta, classes))
    student, teacher, classes = paired(student_logits, teacher_logits, labels, t)
    above = teacher >= teacher.gather(1, classes[:, None])  # the label among them
    if partial(teacher_logits):
        # Each class of the rest is below the label, unless the label is the least of the kept: then
        # the rest is all that is left, and MCD is 0 either way. Only their sum may be above it.
        above[:, -1] = False
    mcd = t**2 * kl(without(teacher / t, above), without(student / t, above))
    return reduced(alpha * scd + beta * mcd, reduction)


def _most_confident(given: TeacherRows, rows: Tensor) -> Tensor:
    """The likeliest class; of rows known in part among the kept ones: the rest is no class."""
    return (rows[:, :-1] if partial(given) else rows).argmax(1)
