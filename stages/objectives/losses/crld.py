"""CRLD: KD within the weak and strong view of a sample, and across them, where it is confident."""

from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import TeacherRows, centred, check_two_views, kl, whole
from stages.objectives.losses.standardise import standardised


@loss(
    "crld",
    reads_labels=False,
    ce_weight=2.0,
    weight=1.0,
    couples_rows=True,
    views=2,
    standardises=True,
)
def crld(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 2.0,
    beta: float = 0.5,
    sure_weak: float = 0.9,
    sure_strong: float = 0.2,
    standardise: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Zhang et al. 2024, "Cross-View Consistency Regularisation for Knowledge Distillation".

    ACM MM 2024, as its code has it. With KD(s, t) = T^2 KL(softmax(z_t / T) || softmax(z_s / T)):

        alpha mean_i m_w (KD(weak, weak) + KD(strong, strong))
        + beta mean_i m_s (KD(strong, weak) + KD(weak, strong))         KD(student's, teacher's)

    m_w is 1 where the teacher gives some class at least `sure_weak` on the weak view, m_s where it
    gives one at least `sure_strong` on the strong view, both at temperature 1, else 0. CE of 1 on
    either view is the default ce_weight of 2.
    student_logits, teacher_logits: float (2, B, C): rows of the weak views, and rows of the strong
    views of the same samples; rows by temperature are (2B, C). labels: not used. standardise: of
    the KD terms; the masks read the teacher's own logits. weights: float (2B,), of the rows, 1 if
    None; across views a term weighs sqrt(w_i w_j), so that rows of weight 0 are as if they were not
    there. Returns float32, (). Raises ConfigError for rows of one view. Needs whole rows.
    """
    unsoftened = whole(teacher_logits, "crld", 1.0)
    check_two_views(student_logits, "crld")
    student, t = centred(student_logits.flatten(0, 1)), temperature
    teacher = centred(whole(teacher_logits, "crld", t).reshape(student.shape))
    confident = unsoftened.reshape(student.shape).softmax(1).amax(1).chunk(2)
    within, across = confident[0] >= sure_weak, confident[1] >= sure_strong
    if standardise:
        student, teacher = standardised(student), standardised(teacher)
    taught = t**2 * kl(teacher / t, student / t)  # (2B,): weak and weak, strong and strong
    half = len(student) // 2
    crossed = t**2 * kl(teacher / t, student.roll(half, 0) / t)
    if weights is not None:
        taught, crossed = weights * taught, (weights * weights.roll(half)).sqrt() * crossed
    (one, two), (there, back) = taught.chunk(2), crossed.chunk(2)
    return (alpha * within * (one + two) + beta * across * (there + back)).mean()
