"""KD: the softened distributions of teacher and student."""

from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import Reduction, TeacherRows, kl, paired, reduced


@loss(
    "kd",
    reads_labels=False,
    ce_weight=0.1,
    weight=0.9,
    reads=("temperature",),
    lskd={"temperature": 2.0, "weight": 9.0},
)
def kd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)): Hinton, Vinyals, Dean 2015, arXiv 1503.02531.

    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,).
    """
    student, teacher, _ = paired(student_logits, teacher_logits, labels, temperature)
    rows = temperature**2 * kl(teacher / temperature, student / temperature)
    return reduced(rows, reduction)
