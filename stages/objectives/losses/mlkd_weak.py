"""MLKD on one view of every sample, for caches that do not hold weak and strong ones in pairs."""

from torch import Tensor

from stages.objectives.losses.mlkd import FURTHER_TEMPERATURES, class_and_batch, share_below_median
from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import TeacherRows, centred, kl, whole
from stages.objectives.losses.standardise import standardised


@loss(
    "mlkd_weak",
    reads_labels=False,
    ce_weight=0.1,
    weight=0.9,
    couples_rows=True,
    standardises=True,
    lskd={"temperature": 2.0, "weight": 9.0},
)
def mlkd_weak(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    standardise: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """The terms of `mlkd` that read the weak view alone (`loss_kd_weak`, `loss_cc_weak` and
    `loss_bc_weak` of its released code), with that view the one that is shown.

    student_logits, teacher_logits: float (B, C). labels: not used. standardise, weights and the
    code's masks, which only scale: as in `mlkd`; weights (B,). Returns float32, (). Needs whole
    rows.
    """
    confidence = whole(teacher_logits, "mlkd_weak", 1.0).softmax(1)
    unsure, rare = share_below_median(confidence.amax(1)), share_below_median(confidence.sum(0))
    student = centred(student_logits)
    weights = student.new_ones(len(student)) if weights is None else weights
    total = student.new_zeros(())
    for t in (temperature, *FURTHER_TEMPERATURES):
        teacher = centred(whole(teacher_logits, "mlkd_weak", t))
        z_s, z_t = (standardised(z) if standardise else z for z in (student, teacher))
        rows = (weights * t**2 * kl(z_t / t, z_s / t)).mean()
        classes, batch = class_and_batch(student, teacher, t, weights)
        total = total + unsure * (rows + batch) + rare * classes
    return total
