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
    """A slab: all rows of one view, or some (n of N).

    arrays: what the encoding stored, each (n, ...). predictions, labels: int64 (n,), row order.
    row_of: int64 (N,), where among these rows each sample is; n for those that were not read.
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
            encoding=self.encoding.to(device),
            arrays={name: array.to(device) for name, array in self.arrays.items()},
            predictions=self.predictions.to(device),
            labels=self.labels.to(device),
            row_of=self.row_of.to(device),
            rectified=moved,
        )

    def rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        """The teacher's logits for dataset indices int64 (n,): float32 (n, C).

        temperature: at which the rest of a row weighs what it should, where only part of it is
        kept (`topk`).
        """
        return self.encoding.decode(self._encoded(samples), temperature)

    def kept(self, samples: Tensor) -> Tensor | None:
        """The classes whose logits are known, int64 (n, k); None if all are."""
        if self.encoding.keeps_all:
            return None
        return self.encoding.kept(self._encoded(samples))

    def _encoded(self, samples: Tensor) -> dict[str, Tensor]:
        rows = self._rows_of(samples)
        return {name: array[rows] for name, array in self.arrays.items()}

    def _rows_of(self, samples: Tensor) -> Tensor:
        """int64 (n,). Raises CacheError for a sample that was not read; on a GPU, where asking
        would cost a wait in every batch, indexing beyond the end stops the device instead.
        """
        rows = self.row_of[samples]
        if not rows.is_cuda and bool((rows == len(self.labels)).any()):
            absent = int(samples[rows == len(self.labels)][0])
            raise CacheError(f"sample {absent} is not among the rows that were read")
        return rows

    def wrong(self, samples: Tensor) -> Tensor:
        """bool (n,): whether the teacher's argmax on this view differs from the label."""
        rows = self._rows_of(samples)
        return self.predictions[rows] != self.labels[rows]

    def rectified_rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        """As `rows`, with the two replaced entries on wrong rows: float32 (n, C).

        Raises CacheError if the view was read without a rectification.
        """
        if self.rectified is None:
            raise CacheError("these targets were read without a rectification")
        logits = self.rows(samples, temperature)
        rows = self._rows_of(samples)
        labels, predictions = self.labels[rows, None], self.predictions[rows, None]
        wrong = labels != predictions
        for column, values in (
            (labels, self.rectified.label_logit),
            (predictions, self.rectified.predicted_logit),
        ):
            kept = logits.gather(1, column)
            logits = logits.scatter(1, column, torch.where(wrong, values[rows, None], kept))
        return logits
