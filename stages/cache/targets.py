"""The targets of one view, as a student uses them: encoded in memory, decoded for the rows asked.

Everything is asked by dataset index and answered on the device where the targets lie.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cache.encoding import Encoding
from stages.errors import CacheError


@dataclass(frozen=True)
class RectifiedValues:
    """The two entries of each wrong row that rectification replaces; float32 (N,), row order."""

    label_logit: Tensor
    predicted_logit: Tensor


@dataclass(frozen=True)
class ViewTargets:
    """A slab: all rows of one view.

    arrays: what the encoding stored, each (N, ...). predictions, labels: int64 (N,), row order.
    row_of: int64 (N,), the row of each sample.
    """

    encoding: Encoding
    arrays: Mapping[str, Tensor]
    predictions: Tensor
    labels: Tensor
    row_of: Tensor
    rectified: RectifiedValues | None = None

    def to(self, device: torch.device) -> "ViewTargets":
        """The same targets on another device."""
        moved = self.rectified and RectifiedValues(
            self.rectified.label_logit.to(device), self.rectified.predicted_logit.to(device)
        )
        return dataclasses.replace(
            self,
            arrays={name: array.to(device) for name, array in self.arrays.items()},
            predictions=self.predictions.to(device),
            labels=self.labels.to(device),
            row_of=self.row_of.to(device),
            rectified=moved,
        )

    def rows(self, samples: Tensor) -> Tensor:
        """The teacher's logits for dataset indices int64 (n,): float32 (n, C)."""
        rows = self.row_of[samples]
        return self.encoding.decode({name: array[rows] for name, array in self.arrays.items()})

    def wrong(self, samples: Tensor) -> Tensor:
        """bool (n,): whether the teacher's argmax on this view differs from the label."""
        rows = self.row_of[samples]
        return self.predictions[rows] != self.labels[rows]

    def rectified_rows(self, samples: Tensor) -> Tensor:
        """As `rows`, with the two replaced entries on wrong rows: float32 (n, C).

        Raises CacheError if the view was read without a rectification.
        """
        if self.rectified is None:
            raise CacheError("these targets were read without a rectification")
        logits = self.rows(samples)
        rows = self.row_of[samples]
        labels, predictions = self.labels[rows, None], self.predictions[rows, None]
        wrong = labels != predictions
        for column, values in (
            (labels, self.rectified.label_logit),
            (predictions, self.rectified.predicted_logit),
        ):
            kept = logits.gather(1, column)
            logits = logits.scatter(1, column, torch.where(wrong, values[rows, None], kept))
        return logits
