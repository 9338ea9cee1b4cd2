"""Logit standardisation (LSKD): every row at the same scale, whatever the loss."""

from torch import Tensor

from stages.objectives.losses.rows import centred


def standardised(logits: Tensor) -> Tensor:
    """(z - mean(z)) / (std(z) + 1e-7) over the classes: Sun et al. 2024, arXiv 2403.01427.

    logits: float (B, C), of the student (the gradient flows through) or of the teacher. The
    standard deviation divides by C - 1, as in the released code. Returns float32 (B, C).
    """
    z = centred(logits)
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)
