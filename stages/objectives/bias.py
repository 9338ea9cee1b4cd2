"""Bias elimination, bias rectification and the dynamic loss, as weights on the rows of a batch.

"Can Students Beyond The Teacher? Distilling Knowledge from Teacher's Bias", Zhang et al., AAAI
2025. A row is right where the teacher's argmax on that view equals the label. With b the schedule,

    L = b * L_right + (1 - b) * L_wrong

where L_right is the loss on right rows and L_wrong on wrong rows against their rectified targets.
Both are means over the rows of their own kind in the released code (`subset`); dividing by the
whole batch (`batch`) keeps a rare wrong row from weighing fifty times a right one.

The published schedule ends with no weight on right rows. `ramp` leaves them theirs and lets
rectified rows grow from 0 to 1 along the same curve: L = L_right + (1 - b) L_wrong.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.settings import BiasMode, Reduction, Schedule


@dataclass(frozen=True)
class BiasWeights:
    """The weights of right and of wrong rows in one epoch: numbers, or float32 () on the device."""

    right: float | Tensor
    wrong: float | Tensor
    reduction: Reduction = "batch"

    def rows(self, wrong: Tensor) -> Tensor:
        """wrong: bool (B,). Returns float32 (B,), to be multiplied with row losses and averaged.

        A batch with no row of a kind has no weight on that kind: nothing is divided by zero.
        """
        weights = torch.where(wrong, self.wrong, self.right)
        if self.reduction == "batch":
            return weights
        count_wrong = wrong.sum()
        size = torch.where(wrong, count_wrong, len(wrong) - count_wrong)
        return weights * len(wrong) / size  # a row's own kind is never empty


def bias_weights(
    mode: BiasMode, schedule: Schedule, reduction: Reduction, epoch: int, epochs: int
) -> BiasWeights:
    """The weights in epoch `epoch` (from 0) of `epochs`.

    b moves from 1 to 0: cos^2(pi/2 * e/E) as released, or linearly. `ramp` has 1 - b on wrong rows
    and 1 on right ones. `constant` leaves both kinds at 1: elimination alone, or rectified targets
    alone. `none` and `correct` keep every row at 1.
    """
    if mode in ("none", "correct"):
        return BiasWeights(1.0, 1.0)
    progress = epoch / epochs
    b = 1 - progress if schedule == "linear" else math.cos(math.pi / 2 * progress) ** 2
    right = b if schedule in ("cosine", "linear") else 1.0
    wrong = 1.0 if schedule == "constant" else 1 - b
    return BiasWeights(right, wrong if mode == "rectify" else 0.0, reduction)
