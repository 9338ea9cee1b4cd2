"""WSLD: rows that the teacher finds hard weigh less, a soft form of bias elimination."""

import torch.nn.functional as F
from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import Reduction, TeacherRows, paired, reduced


@loss("wsld", ce_weight=1.0, weight=2.25, reads=(1.0, "temperature"))
def wsld(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """w T^2 sum_c -p_t(c) log p_s(c), w = 1 - exp(-CE_s / CE_t): Zhou et al. 2021,
    arXiv 2102.00650.

    p at T; CE against the label at temperature 1, without gradient. Defaults of the authors for
    CIFAR-100: T = 4, weight 2.25. A cross-entropy: not 0 where student and teacher agree.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows w is
    exact.
    """
    hard_s = F.cross_entropy(student_logits.detach().float(), labels, reduction="none")
    _, teacher, classes = paired(student_logits, teacher_logits, labels, 1.0)
    hard_t = F.cross_entropy(teacher, classes, reduction="none")
    weights = 1 - (-hard_s / (hard_t + 1e-7)).exp()
    student, teacher, _ = paired(student_logits, teacher_logits, labels, temperature)
    soft = F.softmax(teacher / temperature, dim=1)
    rows = -(soft * F.log_softmax(student / temperature, dim=1)).sum(1)
    return reduced(weights * temperature**2 * rows, reduction)
