"""Teachers corrected inside the loss, the relatives of bias rectification: LA, KA-LSR, LR, RC.

Which rows are wrong is what the rows themselves say: their largest logit is not the label's. The
bias-aware module (`stages.objectives.bias`) uses the prediction stored before any encoding; the
two differ where an encoding turns two nearly equal logits round.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.objectives.losses.kd import kd
from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import (
    Reduction,
    TeacherRows,
    centred,
    changed,
    kl,
    known,
    one_hot,
    reduced,
    whole,
)

Average = Literal["kind", "batch"]


@loss("la", ce_weight=0.0, weight=1.0, reads=("temperature",), lskd={"temperature": 2.0})
def la(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD from a teacher whose logits of label and predicted class are swapped: LA, also KA-PS
    (Wen et al. 2019, arXiv 1911.07471) and the teacher's half of SLD. Without cross-entropy in the
    comparison of RLD (arXiv 2408.07703), hence the default ce_weight of 0.

    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Exact of partial rows
    as far as KD is.
    """
    teacher = changed(teacher_logits, lambda rows: swapped(rows, labels))
    return kd(student_logits, teacher, labels, temperature, reduction)


def swapped(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows with the entries of label and largest logit exchanged: float (B, C)."""
    label, top = labels[:, None], logits.argmax(1, keepdim=True)
    at_label, at_top = logits.gather(1, label), logits.gather(1, top)
    return logits.scatter(1, top, at_label).scatter(1, label, at_top)


@loss("ka_lsr", ce_weight=0.1, weight=0.9, reads=("temperature",))
def ka_lsr(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    epsilon: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD, with smoothed labels as the target of wrong rows: Wen et al. 2019, arXiv 1911.07471.

    Wrong rows: T^2 KL(u || softmax(z_s / T)) with u = 1 - epsilon at the label and
    epsilon / (C - 1) elsewhere. epsilon .1 is a third party's; the authors' is not known.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Exact of partial rows
    on wrong rows.
    """
    log_p = F.log_softmax(centred(student_logits) / temperature, dim=1)
    num_classes = log_p.shape[1]
    u = torch.where(one_hot(labels, num_classes), 1 - epsilon, epsilon / (num_classes - 1))
    corrected = temperature**2 * F.kl_div(log_p, u, reduction="none").sum(1)  # 0 log 0 is 0 there
    taught = kd(student_logits, teacher_logits, labels, temperature, "none")
    right = known(teacher_logits, temperature).argmax(1) == labels
    return reduced(torch.where(right, taught, corrected), reduction)


@loss("lr", ce_weight=0.0, weight=1.0, reads_offset=True)
def lr(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    alpha: float = 4.0,
    beta: float = 0.8,
    average: Average = "kind",
    reduction: Reduction = "mean",
) -> Tensor:
    """Label revision: Lan et al. 2024, arXiv 2404.03693, as RLD's code compares with it.

    Right rows: CE + alpha MSE(z_s, z_t). Wrong rows: MSE(p_s, b p_t + (1 - b) onehot(y)) with
    b = beta / (p_t(k) - p_t(y) + 1), k the predicted class, p at temperature 1, and no CE: the CE
    of this loss is its own, hence the default ce_weight of 0. MSE is the mean over classes.
    average: `kind` adds the mean of the right rows and the mean of the wrong rows, as that code
    does (rows are scaled by B over the number of their kind); `batch` is the mean of all rows. Of
    several teachers z_t is the log of their mean probabilities.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Needs whole rows.
    """
    student, teacher = student_logits.float(), whole(teacher_logits, "lr", 1.0)
    label, top = labels[:, None], teacher.argmax(1, keepdim=True)
    right = F.cross_entropy(student, labels, reduction="none")
    right = right + alpha * (student - teacher).square().mean(1)
    p_s, p_t = student.softmax(1), teacher.softmax(1)
    share = beta / (p_t.gather(1, top) - p_t.gather(1, label) + 1)
    revised = share * p_t + (1 - share) * one_hot(labels, p_t.shape[1])
    wrong = (p_s - revised).square().mean(1)
    is_right = top.squeeze(1) == labels
    rows = torch.where(is_right, right, wrong)
    if average == "kind":
        count = is_right.sum()
        rows = rows * len(rows) / torch.where(is_right, count, len(rows) - count)
    return reduced(rows, reduction)


@loss(
    "rc",
    ce_weight=1.0,
    weight=1.0,
    reads=("temperature",),
    lskd={"temperature": 2.0, "weight": 9.0},
)
def rc(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """KD + beta T^2 KL(softmax(r / T) || softmax(z_s / T)), r the student's own logits without
    gradient, its largest added to the label's: RC as the code of RLD (arXiv 2408.07703) has it.

    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). The second term does
    not read the teacher.
    """
    student = student_logits.float()
    own = student.detach()
    largest = own.amax(1, keepdim=True)
    refined = own.scatter_add(1, labels[:, None], largest)
    sides = (centred(z) / temperature for z in (refined, student))
    itself = temperature**2 * kl(*sides)
    taught = kd(student_logits, teacher_logits, labels, temperature, "none")
    return reduced(taught + beta * itself, reduction)
