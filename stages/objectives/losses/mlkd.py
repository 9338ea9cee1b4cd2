"""MLKD: a weak and a strong view of every sample, aligned by rows, by classes and by the batch."""

from torch import Tensor
from torch.nn import functional as F

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import TeacherRows, centred, check_two_views, kl, whole
from stages.objectives.losses.standardise import standardised

FURTHER_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)


@loss(
    "mlkd",
    reads_labels=False,
    ce_weight=0.2,
    weight=0.9,
    couples_rows=True,
    views=2,
    standardises=True,
    lskd={"temperature": 2.0, "weight": 9.0},
)  # CE .1 on either view
def mlkd(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    standardise: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Jin, Wang, Lin 2023, "Multi-Level Logit Distillation" (CVPR), as its released code has it.

    student_logits, teacher_logits: float (2, B, C): rows of the weak views, and rows of the strong
    views of the same samples; rows by temperature are (2B, C). labels: not used. weights: float
    (2B,), of the rows, 1 if None. Returns float32, (). Raises ConfigError for rows of one view.
    With P = softmax(z / T), for T = temperature and every T of 3, 5, 2, 6:

        rows     T^2 mean_i KL(P_t[i] || P_s[i])         of the weak and of the strong views
        classes  sum (P_t' P_t - P_s' P_s)^2 / C         of the weak views
        batch    sum (P_t P_t' - P_s P_s')^2 / B         of the weak views

    The code differs from the paper, and is followed because the published numbers are its: its
    masks of the weak views (rows whose teacher is more confident than the median, likewise classes)
    select nothing but multiply by the share of what they would keep, the strong row terms of T = 2
    and 6 read the weak views, and class and batch terms of the strong views are not added.
    standardise: as in the code of LSKD (arXiv 2403.01427), where only the row terms read
    standardised logits.

    Weights of rows: KL terms are mean_i w_i KL_i. Class and batch terms are sums over pairs of
    rows, where a pair weighs sqrt(w_i w_j): rows of weight 0 are as if they were not there, and
    equal weights scale the loss.
    """
    surest = whole(teacher_logits, "mlkd", 1.0)
    check_two_views(student_logits, "mlkd")
    student = centred(student_logits.flatten(0, 1))
    ones = student.new_ones(len(student))
    weak_w, strong_w = (ones if weights is None else weights).chunk(2)
    confidence = surest.reshape(student.shape).chunk(2)[0].softmax(1)
    unsure = share_below_median(confidence.amax(1))
    rare = share_below_median(confidence.sum(0))
    total = student.new_zeros(())
    for place, t in enumerate((temperature, *FURTHER_TEMPERATURES)):
        teacher = centred(whole(teacher_logits, "mlkd", t).reshape(student.shape))
        z_s, z_t = (standardised(z) if standardise else z for z in (student, teacher))
        weak, strong = (t**2 * kl(z_t / t, z_s / t)).chunk(2)
        weak_term, strong_term = (weak_w * weak).mean(), (strong_w * strong).mean()
        total = total + unsure * weak_term + (strong_term if place < 3 else weak_term)
        classes, batch = class_and_batch(student.chunk(2)[0], teacher.chunk(2)[0], t, weak_w)
        total = total + rare * classes + unsure * batch
    return total


def class_and_batch(student: Tensor, teacher: Tensor, t: float, weights: Tensor) -> list[Tensor]:
    """The terms of classes and of the batch at one temperature: float32, () each. weights: (B,)."""
    # A pair of rows is multiplied by the roots of both, and squared: so each root is a fourth.
    p_s, p_t = (weights.pow(0.25)[:, None] * F.softmax(z / t, dim=1) for z in (student, teacher))
    classes = (p_t.T @ p_t - p_s.T @ p_s).square().sum() / p_t.shape[1]
    batch = (p_t @ p_t.T - p_s @ p_s.T).square().sum() / len(p_t)
    return [classes, batch]


def share_below_median(values: Tensor) -> Tensor:
    """The share of values that are at most the median, as numpy.percentile interpolates it."""
    return (values <= values.quantile(0.5)).float().mean()
