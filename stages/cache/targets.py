"""The targets of one view, as a student uses them: encoded in memory, decoded for the rows asked.

Everything is asked by dataset index and answered on the device where the targets lie.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from stages.cache.encoding import Encoding
from stages.errors import CacheError


class TargetRows(Protocol):
    """What is learned from some samples (n of them), in their order. A loss takes it as it is where
    rows depend on the temperature, see `stages.objectives.losses.Rows`.
    """

    @property
    def tempered(self) -> bool:
        """Whether rows depend on the temperature: part of them is kept, or they are averaged."""

    def at(self, temperature: float = 1.0) -> Tensor:
        """The teacher's logits, rectified where that was asked for: float32 (n, C).

        temperature: at which the rest of a row weighs what it should, where only part of it is
        kept (`topk`).
        """

    def kept(self) -> Tensor | None:
        """The classes whose logits are known, int64 (n, k); None if all are."""

    def wrong(self) -> Tensor:
        """bool (n,): whether the teacher's argmax on this view differs from the label; of rectified
        rows, without those that the rectification trusts. Raises CacheError where samples have no
        labels.
        """


class Targets(ABC):
    """What is learned from, asked by dataset index int64 (n,).

    For several questions about the same samples, ask `of` once.
    """

    @abstractmethod
    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> TargetRows:
        """The targets of some samples. rectified: with the two replaced entries on wrong rows.
        calibrated: logits divided by the temperature that was fitted to the teacher.

        Raises CacheError for a sample that was not read, or where the view was read without a
        rectification or is of a cache that is not calibrated.
        """

    def shown(self, views: Sequence[int]) -> "Targets":
        """Of targets of several views those of some, for samples that are asked for in one view
        after another; () for all.
        """
        return self

    def rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        """The teacher's logits, float32 (n, C); see `TargetRows.at`."""
        return self.of(samples).at(temperature)

    def rectified_rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        """As `rows`, rectified: float32 (n, C)."""
        return self.of(samples, rectified=True).at(temperature)

    def kept(self, samples: Tensor) -> Tensor | None:
        """The classes whose logits are known, int64 (n, k); None if all are."""
        return self.of(samples).kept()

    def wrong(self, samples: Tensor) -> Tensor:
        """bool (n,): whether the teacher's argmax on this view differs from the label. Raises
        CacheError where samples have no labels.
        """
        return self.of(samples).wrong()


@dataclass(frozen=True)
class RectifiedValues:
    """The two entries of each wrong row that rectification replaces; float32 (N,), row order.

    some_trusted: NaN stands where a row that answers another class than the label is left as it is.
    """

    label_logit: Tensor
    predicted_logit: Tensor
    some_trusted: bool = False


@dataclass(frozen=True)
class SharedTargets:
    """What all views of a cache have in common, and hold once; fields as in `ViewTargets`."""

    encoding: Encoding
    labels: Tensor
    row_of: Tensor
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "SharedTargets":
        """The same on another device."""
        return SharedTargets(
            self.encoding.to(device), self.labels.to(device), self.row_of.to(device)
        ).with_anchor(self.anchor, device)

    def with_anchor(self, anchor: Mapping[str, Tensor], device: torch.device) -> "SharedTargets":
        """The same with the anchor's arrays on a device."""
        moved = {name: array.to(device) for name, array in anchor.items()}
        return dataclasses.replace(self, anchor=moved)


@dataclass(frozen=True)
class ViewTargets(Targets):
    """A slab: all rows of one view, or some (n of N).

    arrays: what the encoding stored, each (n, ...). predictions: int32 or int64 (n,), labels: int64
    (n,), row order. row_of: int64 (N,), where among these rows each sample is; n for those that
    were not read. labelled: whether samples have labels. calibration: what logits can be divided
    by, None where that is not known. anchor: what these rows are coded beside, as
    `Encoding.as_anchor` gives it, each (n, ...); empty where that is nothing.
    """

    encoding: Encoding
    arrays: Mapping[str, Tensor]
    predictions: Tensor
    labels: Tensor
    row_of: Tensor
    rectified: RectifiedValues | None = None
    labelled: bool = True
    calibration: float | None = None
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shared(self) -> SharedTargets:
        """What all views of the cache have in common."""
        return SharedTargets(self.encoding, self.labels, self.row_of, self.anchor)

    @property
    def encoded(self) -> dict[str, Tensor]:
        """All that a row is decoded from, each (n, ...)."""
        return {**self.arrays, **self.anchor}

    @cached_property
    def mistakes(self) -> Tensor:
        """bool (n,), row order: whether the teacher's answer differs from the label. Made once, as
        every batch asks for it.
        """
        return self.predictions != self.labels

    def to(self, device: torch.device) -> "ViewTargets":
        """The same targets on another device."""
        return self.moved(lambda tensor: tensor.to(device), self.shared.to(device))

    def moved(self, move: Callable[[Tensor], Tensor], shared: SharedTargets) -> "ViewTargets":
        """The same targets where `move` puts a tensor. shared: what is there already."""
        values = self.rectified and RectifiedValues(
            move(self.rectified.label_logit),
            move(self.rectified.predicted_logit),
            self.rectified.some_trusted,
        )
        arrays = {name: move(array) for name, array in self.arrays.items()}
        predictions = arrays.get("prediction")  # where the encoding reads it, once for both
        return dataclasses.replace(
            self,
            encoding=shared.encoding,
            arrays=arrays,
            predictions=move(self.predictions) if predictions is None else predictions,
            labels=shared.labels,
            row_of=shared.row_of,
            rectified=values,
            anchor=shared.anchor if self.anchor else {},
        )

    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> "ViewRows":
        """See `Targets.of`. On a GPU, where asking would cost a wait in every batch, a sample that
        was not read is an index beyond the end, which stops the device.
        """
        if rectified and self.rectified is None:
            raise CacheError("these targets were read without a rectification")
        if calibrated and self.calibration is None:
            raise CacheError("these targets are of a cache that is not calibrated")
        rows, read = self.row_of[samples], len(self.labels)
        if read < len(self.row_of) and not rows.is_cuda and bool((rows == read).any()):
            absent = int(samples[rows == read][0])
            raise CacheError(f"sample {absent} is not among the rows that were read")
        by = self.calibration if calibrated else None
        return ViewRows(self, rows, self.rectified if rectified else None, by)


@dataclass(frozen=True)
class ViewRows:
    """Some rows of a slab. index: int64 (n,), where they are in it. divisor: of their logits, None
    for 1. See `TargetRows`.
    """

    view: ViewTargets
    index: Tensor
    rectified: RectifiedValues | None = None
    divisor: float | None = None

    @cached_property
    def _encoded(self) -> dict[str, Tensor]:
        return {name: array[self.index] for name, array in self.view.encoded.items()}

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """The label and the teacher's answer: int64 (n,), and an integer (n,)."""
        return self.view.labels[self.index], self.view.predictions[self.index]

    @cached_property
    def _kept(self) -> Tensor:
        return self.view.encoding.kept(self._encoded)

    @property
    def tempered(self) -> bool:
        """See `TargetRows.tempered`."""
        return not self.view.encoding.keeps_all

    def kept(self) -> Tensor | None:
        """See `TargetRows.kept`."""
        return self._kept if self.tempered else None

    def wrong(self) -> Tensor:
        """See `TargetRows.wrong`."""
        if not self.view.labelled:
            raise CacheError("the samples have no labels: none of their rows is right or wrong")
        return self._wrong

    @cached_property
    def _wrong(self) -> Tensor:
        wrong = self.view.mistakes[self.index]
        if self.rectified is not None and self.rectified.some_trusted:
            return wrong & ~self.rectified.label_logit[self.index].isnan()
        return wrong

    def at(self, temperature: float = 1.0) -> Tensor:
        """See `TargetRows.at`."""
        if self.divisor is None:
            return self._stored_at(temperature)
        return self._stored_at(temperature * self.divisor) / self.divisor

    def _stored_at(self, temperature: float) -> Tensor:
        """As they are stored, and rectified."""
        logits = self.view.encoding.decode(self._encoded, temperature)
        if self.rectified is None:
            return logits
        columns = torch.stack(self._classes, 1).long()
        values = self.rectified.label_logit, self.rectified.predicted_logit
        new = torch.stack([value[self.index] for value in values], 1)
        # The two columns of a right row are one, which keeps its value.
        changed = torch.where(self.wrong()[:, None], new, logits.gather(1, columns))
        return logits.scatter(1, columns, changed)


# ---- blocks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block as it was written: its rows in row order.

    logits: float32 (n, C), decoded. labels, predictions: int64 (n,).
    """

    logits: Tensor
    labels: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class EncodedBlock:
    """As `Block`, still encoded. arrays: what the encoding stored, each (n, ...)."""

    encoding: Encoding
    arrays: Mapping[str, Tensor]
    labels: Tensor
    predictions: Tensor

    def logits(self, temperature: float, rows: Tensor | None = None) -> Tensor:
        """float32 (m, C), decoded as `Encoding.decode` says. rows: int64 (m,), None for all.

        A row decoded among others may differ in its last bit: matrix products round as they like.
        """
        some = {n: x if rows is None else x[rows] for n, x in self.arrays.items()}
        return self.encoding.decode(some, temperature)
