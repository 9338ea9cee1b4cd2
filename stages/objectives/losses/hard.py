"""Cross-entropy with the labels: the baseline, and a part of almost every other loss."""

import torch.nn.functional as F
from torch import Tensor

from stages.objectives.losses.registry import loss
from stages.objectives.losses.rows import Reduction, TeacherRows


@loss("ce", ce_weight=1.0, weight=0.0, reads=())
def ce(
    student_logits: Tensor,
    teacher_logits: TeacherRows | None,
    labels: Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with the hard labels; the teacher plays no part.

    student_logits: float (B, C). labels: int64 (B,). Returns float32, () or (B,).
    """
    return F.cross_entropy(student_logits.float(), labels, reduction=reduction)


def mixed_ce(
    student_logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of mixed images: s CE(z, y) + (1 - s) CE(z, y_partner), Zhang et al. 2018,
    arXiv 1710.09412; plain cross-entropy where nothing is mixed.

    student_logits: float (B, C). labels, partner_labels: int64 (B,). shares: float32 (B,), s.
    Returns float32, ().
    """
    if partner_labels is None or shares is None:
        return ce(student_logits, None, labels)
    own = ce(student_logits, None, labels, reduction="none")
    partners = ce(student_logits, None, partner_labels, reduction="none")
    return (shares * own + (1 - shares) * partners).mean()
