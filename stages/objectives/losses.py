"""What a student minimises against its teacher's logits, one function a loss.

Every loss takes (student_logits, teacher_logits, labels) and returns the mean over the batch, or
with reduction="none" one number a row, so that bias-aware weights can be put on rows.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "none"]


def ce(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with the hard labels; the teacher and the temperature play no part.

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


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)): Hinton, Vinyals, Dean 2015, arXiv 1503.02531.

    student_logits, teacher_logits: float (B, C). Returns float32, () or (B,).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2
    return rows.mean() if reduction == "mean" else rows


def lump(logits: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """The logits of some classes, and one for all other classes together.

    logits: float (n, C). kept: int64 (n, k), k < C, distinct in each row. Returns (n, k + 1): with
    softmax(. / temperature), the last entry is the probability of all the rest. A loss on rows
    lumped on both sides is exact in what is kept and blind to how the rest divides; renormalising
    the kept ones instead would pull them up (Sparse Logit Sampling, 2503.16870).
    """
    rest = logits.scatter(1, kept, -torch.inf)
    together = temperature * torch.logsumexp(rest / temperature, dim=1, keepdim=True)
    return torch.cat([logits.gather(1, kept), together], dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {"ce": ce, "kd": kd}
"""Every loss by its name on the command line."""
