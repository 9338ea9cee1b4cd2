"""What every epoch of a run learns from: the targets of its view, from one cache or several.

A slab is what a student reads at once: all rows of one view (of two, for a loss that sees two at
once; of those of all epochs of a round), or, where that is too much, a group of its chunks
(`chunks.py`). It is read in a thread of its own while the slab before it trains, so that at most
two are held: the one in use and the next.
"""

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.targets import SharedTargets, TargetRows, Targets, ViewTargets
from stages.order import ViewSchedule
from stages.targets.chunks import SlabPlan
from stages.targets.ensemble import EnsembleTargets

What = TypeVar("What")
Slab = TypeVar("Slab")


@dataclass(frozen=True)
class _Part:
    """What is read at once: the views that an epoch shows, or some chunks of them."""

    views: tuple[int, ...]
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Read:
    """Which runs of rows are read, None for all; and by cache what the views of these share."""

    runs: list[slice] | None
    shared: dict[int, SharedTargets]


class TargetReader:
    """The targets of the epochs of a run, or of several that share them."""

    def __init__(
        self,
        caches: Sequence[LogitCache],
        rectified: str | None,
        schedule: ViewSchedule,
        plan: SlabPlan,
        labels: Tensor,
        students: int = 1,
    ) -> None:
        """labels: int64 (N,), on the device where targets are needed. students: how many are
        trained meanwhile, which wait together.
        """
        self._caches, self._rectified, self._labels = caches, rectified, labels
        self._schedule, self._groups, self._share = schedule, plan.groups, plan.share
        self._students = students
        self._upload, self._shared = Upload(labels.device), dict[int, SharedTargets]()
        self._slabs = SlabReader(
            self._read, self._parts_of, schedule.epochs, plan.resident, self._next_round
        )
        self._before: dict[int, float] = {}

    def waited(self, epoch: int) -> float:
        """A student's share of the seconds that all of them waited for an epoch's targets."""
        of_round = self._slabs.waited[self._schedule.rounds.of(epoch).first]
        return (of_round - self._before.get(epoch, of_round)) / self._students

    def of_epoch(self, epoch: int) -> Targets:
        """The targets of an epoch's views; of views seen at once for batches that join them."""
        first = self._schedule.rounds.of(epoch).first
        self._before.setdefault(epoch, self._slabs.waited[first])
        if self._groups is None or self._share is not None:
            return self._slabs.slab(first)
        group_of = self._groups.group_of(self._schedule.seed, first).to(self._labels.device)
        return GroupedTargets(self._slabs, first, group_of)

    def _next_round(self, first: int) -> int:
        return first + self._schedule.rounds.of(first).count

    def _parts_of(self, epoch: int) -> list[_Part]:
        views = self._schedule.of_epoch(epoch)
        if self._groups is None:
            return [_Part(views)]
        groups = self._groups.chunks(self._schedule.seed, epoch)
        if self._share is not None:
            groups = [groups[self._share]]
        return [_Part(views, chunks) for chunks in groups]

    def _read(self, part: _Part) -> Targets:
        read = _Read(None, self._shared)  # whole views share what is held for all of them
        if self._groups is not None:
            read = _Read(self._groups.runs(part.chunks), {})
        views = {view: self._read_view(view, read) for view in part.views}
        return JoinedTargets(views) if len(views) > 1 else views[part.views[0]]

    def _read_view(self, view: int, read: _Read) -> Targets:
        members = [self._read_member(which, view, read) for which in range(len(self._caches))]
        return members[0] if len(members) == 1 else EnsembleTargets(members, self._labels)

    def _read_member(self, which: int, view: int, read: _Read) -> ViewTargets:
        shared, device = read.shared.get(which), self._upload.device
        anchor = None if shared is None else shared.anchor
        targets = self._caches[which].read_view(view, self._rectified, read.runs, anchor)
        if shared is None:
            shared = targets.shared.to(device)
        elif targets.anchor and not shared.anchor:  # the anchor itself was read before
            shared = shared.with_anchor(targets.anchor, device)
        read.shared[which] = shared
        return targets.moved(self._upload, shared)


@dataclass(frozen=True)
class JoinedTargets(Targets):
    """The targets of several views of the same samples, asked view after view in one batch."""

    views: Mapping[int, Targets]

    def shown(self, views: Sequence[int]) -> Targets:
        some = {view: self.views[view] for view in views or self.views}
        return JoinedTargets(some) if len(some) > 1 else some[views[0]]

    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> TargetRows:
        parts = samples.chunk(len(self.views))
        asked = zip(self.views.values(), parts, strict=True)
        return JoinedRows([view.of(some, rectified, calibrated) for view, some in asked])


@dataclass(frozen=True)
class GroupedTargets(Targets):
    """The targets of an epoch that is read in groups; samples are asked for group by group.

    A batch that lies across two groups is answered from both; only then are both needed at once.
    group_of: int64 (N,), the group that shows each sample. views: those that are asked for, see
    `Targets.shown`.
    """

    reader: "SlabReader[_Part, Targets]"
    epoch: int
    group_of: Tensor
    views: Sequence[int] = ()

    def shown(self, views: Sequence[int]) -> Targets:
        return dataclasses.replace(self, views=views)

    def of(self, samples: Tensor, rectified: bool = False, calibrated: bool = False) -> TargetRows:
        groups = self.group_of[samples]
        first, last = torch.stack(groups.aminmax()).tolist()
        slabs = [slab.shown(self.views) for slab in self.reader.slabs(self.epoch, first, last)]
        if first == last:
            return slabs[0].of(samples, rectified, calibrated)
        order = groups.argsort(stable=True)  # group by group
        parts = samples[order].split((groups - first).bincount().tolist())
        asked = zip(slabs, parts, strict=True)
        found = [slab.of(part, rectified, calibrated) for slab, part in asked]
        return JoinedRows(found, order.argsort())


@dataclass(frozen=True)
class JoinedRows:
    """Several answers as one, see `TargetRows`. order: int64 (n,), where among all of them, one
    after another, each sample is; None where that is their order.
    """

    parts: Sequence[TargetRows]
    order: Tensor | None = None

    @property
    def tempered(self) -> bool:
        return self.parts[0].tempered

    def at(self, temperature: float = 1.0) -> Tensor:
        return self._joined([part.at(temperature) for part in self.parts])

    def kept(self) -> Tensor | None:
        return self._kept

    @cached_property
    def _kept(self) -> Tensor | None:
        found = [kept for part in self.parts if (kept := part.kept()) is not None]
        return self._joined(found) if found else None

    def wrong(self) -> Tensor:
        return self._joined([part.wrong() for part in self.parts])

    def _joined(self, answers: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(answers))
        return joined if self.order is None else joined[self.order]


# ---- reading ahead ----------------------------------------------------------------------


class SlabReader(Generic[What, Slab]):
    """Slabs in the order of the epochs. `waited`: seconds spent waiting for those of each epoch.

    parts_of: what an epoch reads, one slab each, in the order in which they are used. resident:
    keep every slab that was read. next_epoch: which epoch comes after one that is read.
    """

    def __init__(
        self,
        read: Callable[[What], Slab],
        parts_of: Callable[[int], Sequence[What]],
        epochs: int,
        resident: bool,
        next_epoch: Callable[[int], int] = lambda epoch: epoch + 1,
    ) -> None:
        self._read, self._epochs, self._next_epoch = read, epochs, next_epoch
        self._parts_of = functools.lru_cache(maxsize=2)(parts_of)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slab")
        self._ahead: dict[What, Future[Slab]] = {}
        self._resident = resident
        self.waited: defaultdict[int, float] = defaultdict(float)

    def slab(self, epoch: int, part: int = 0) -> Slab:
        """A slab of an epoch; starts reading the next one."""
        return self.slabs(epoch, part, part)[0]

    def slabs(self, epoch: int, first: int, last: int) -> list[Slab]:
        """The slabs first..last of an epoch, where a batch needs more than one. All others are let
        go; the next is read ahead where only one is in use.
        """
        started = time.perf_counter()
        parts = self._parts_of(epoch)
        needed = parts[first : last + 1]
        if not self._resident:
            kept = {*needed, *self._next(epoch, last)}
            self._ahead = {what: f for what, f in self._ahead.items() if what in kept}
        slabs = [future.result() for future in [self._future(what) for what in needed]]
        self.waited[epoch] += time.perf_counter() - started
        if first == last:
            for what in self._next(epoch, last):
                self._future(what)
        return slabs

    def _next(self, epoch: int, part: int) -> Sequence[What]:
        if part + 1 < len(parts := self._parts_of(epoch)):
            return parts[part + 1 : part + 2]
        following = self._next_epoch(epoch)
        return self._parts_of(following)[:1] if following < self._epochs else ()

    def _future(self, what: What) -> Future[Slab]:
        if what not in self._ahead:
            self._ahead[what] = self._pool.submit(self._read, what)
        return self._ahead[what]


class Upload:
    """Copies to a device for a thread that reads ahead: on a GPU beside what computes there, from
    pinned memory and on a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, complete when this returns."""
        if self._stream is None:
            return tensor.to(self.device)
        pinned = tensor.pin_memory()
        # Memory of the stream that computes, as what is dropped there is given out again in that
        # stream's order; so the copy waits for whatever still uses this memory.
        moved = torch.empty_like(pinned, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            moved.copy_(pinned, non_blocking=True)
        self._stream.synchronize()
        return moved
