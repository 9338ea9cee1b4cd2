"""AdaptConf: KD from a weak teacher, and the student's own answer where the two are as likely."""

import torch.nn.functional as F
from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import (
    Reduction,
    TeacherRows,
    centred,
    kl,
    known,
    paired,
    reduced,
)


@loss("adaptconf", reads_labels=False, ce_weight=1.0, weight=1.0, reads=("temperature",))
def adaptconf(
    student_logits: Tensor,
    teacher_logits: TeacherRows,
    labels: Tensor,
    temperature: float = 1.0,
    sure_temperature: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    """(1 - b) T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + b CE(z_s, k): Guo et al. 2024,
    arXiv 2402.03749, as in its code.

    k is the student's own class, j the teacher's, and

        b = p_s(j)^(1/c) / (p_s(j)^(1/c) + p_s(k)^(1/c))

    with p_s at temperature 1, without gradient, and c = sure_temperature, which the code calls its
    threshold. b is at most 1/2, where the two agree: the less likely the student finds the
    teacher's class, the more it is taught. Defaults of the code and of its commands. labels: not
    used.
    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,). Of partial rows b is
    exact.
    """
    log_p = F.log_softmax(centred(student_logits), dim=1)
    theirs = known(teacher_logits, temperature).argmax(1, keepdim=True)
    own = log_p.amax(1)
    gap = log_p.detach().gather(1, theirs).squeeze(1) - own.detach()  # at most 0
    b = (gap / sure_temperature).sigmoid()
    student, teacher, _ = paired(student_logits, teacher_logits, labels, temperature)
    taught = temperature**2 * kl(teacher / temperature, student / temperature)
    return reduced((1 - b) * taught - b * own, reduction)
