"""What every epoch of a run learns from: the targets of its view, from one cache or several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.training.budget import SlabPlan
from stages.training.ensemble import EnsembleTargets
from stages.training.slabs import SlabReader
from stages.training.trainer import view_order

Answer = TypeVar("Answer", Tensor, Tensor | None)


class Targets(Protocol):
    """What is learned from, asked by dataset index int64 (n,): see `ViewTargets`."""

    def rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor: ...
    def kept(self, samples: Tensor) -> Tensor | None: ...
    def wrong(self, samples: Tensor) -> Tensor: ...
    def rectified_rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor: ...


@dataclass(frozen=True)
class _Part:
    """What is read at once: the views that an epoch shows, or some chunks of them."""

    views: tuple[int, ...]
    chunks: tuple[int, ...] = ()


class TargetReader:
    """The targets of the epochs of a run, or of several that share them."""

    def __init__(
        self,
        caches: Sequence[LogitCache],
        rectified: str | None,
        views: Sequence[tuple[int, ...]],
        plan: SlabPlan,
        epochs: int,
        seed: int,
        labels: Tensor,
        students: int = 1,
    ) -> None:
        """views: what an epoch may show: a view, or the views of a sample that are seen at once.
        seed: seed.data. labels: int64 (N,), on the device where targets are needed. students: how
        many are trained meanwhile, which wait together.
        """
        self._caches, self._rectified, self._labels = caches, rectified, labels
        self._views, self._seed, self._groups, self._share = views, seed, plan.groups, plan.share
        self._students = students
        self._slabs = SlabReader(self._read, self._parts_of, epochs, plan.resident)

    def views_of(self, epoch: int) -> tuple[int, ...]:
        """The views that an epoch shows at once."""
        return self._views[view_order(self._seed, epoch, len(self._views))]

    def waited(self, epoch: int) -> float:
        """A student's share of the seconds that all of them waited for an epoch's targets."""
        return self._slabs.waited[epoch] / self._students

    def of_epoch(self, epoch: int) -> Targets:
        """The targets of an epoch's views; of views seen at once for batches that join them."""
        if self._groups is None or self._share is not None:
            return self._slabs.slab(epoch)
        group_of = self._groups.group_of(self._seed, epoch).to(self._labels.device)
        return GroupedTargets(self._slabs, epoch, group_of)

    def _parts_of(self, epoch: int) -> list[_Part]:
        views = self.views_of(epoch)
        if self._groups is None:
            return [_Part(views)]
        groups = self._groups.chunks(self._seed, epoch)
        if self._share is not None:
            groups = [groups[self._share]]
        return [_Part(views, chunks) for chunks in groups]

    def _read(self, part: _Part) -> Targets:
        runs = None if self._groups is None else self._groups.runs(part.chunks)
        views = [self._read_view(view, runs) for view in part.views]
        return views[0] if len(views) == 1 else JoinedTargets(views)

    def _read_view(self, view: int, runs: list[slice] | None) -> Targets:
        members = [
            cache.read_view(view, self._rectified, runs).to(self._labels.device)
            for cache in self._caches
        ]
        return members[0] if len(members) == 1 else EnsembleTargets(members, self._labels)


@dataclass(frozen=True)
class JoinedTargets:
    """The targets of several views of the same samples, asked view after view in one batch."""

    views: Sequence[Targets]

    def rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        return self._ask(samples, lambda view, some: view.rows(some, temperature))

    def kept(self, samples: Tensor) -> Tensor | None:
        answers = [v.kept(s) for v, s in self._parts(samples)]
        found = [answer for answer in answers if answer is not None]
        return torch.cat(found) if found else None

    def wrong(self, samples: Tensor) -> Tensor:
        return self._ask(samples, lambda view, some: view.wrong(some))

    def rectified_rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        return self._ask(samples, lambda view, some: view.rectified_rows(some, temperature))

    def _parts(self, samples: Tensor) -> Iterator[tuple[Targets, Tensor]]:
        return zip(self.views, samples.chunk(len(self.views)), strict=True)

    def _ask(self, samples: Tensor, question: Callable[[Targets, Tensor], Tensor]) -> Tensor:
        return torch.cat([question(view, some) for view, some in self._parts(samples)])


@dataclass(frozen=True)
class GroupedTargets:
    """The targets of an epoch that is read in groups; samples are asked for group by group.

    A batch that lies across two groups is answered from both; only then are both needed at once.
    group_of: int64 (N,), the group that shows each sample.
    """

    reader: SlabReader[_Part, Targets]
    epoch: int
    group_of: Tensor

    def rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        return self._ask(samples, lambda slab, some: slab.rows(some, temperature))

    def kept(self, samples: Tensor) -> Tensor | None:
        return self._ask(samples, lambda slab, some: slab.kept(some))

    def wrong(self, samples: Tensor) -> Tensor:
        return self._ask(samples, lambda slab, some: slab.wrong(some))

    def rectified_rows(self, samples: Tensor, temperature: float = 1.0) -> Tensor:
        return self._ask(samples, lambda slab, some: slab.rectified_rows(some, temperature))

    def _ask(self, samples: Tensor, question: Callable[[Targets, Tensor], Answer]) -> Answer:
        groups = self.group_of[samples]
        first, last = torch.stack(groups.aminmax()).tolist()
        slabs = self.reader.slabs(self.epoch, first, last)
        if first == last:
            return question(slabs[0], samples)
        order = groups.argsort(stable=True)  # group by group
        parts = samples[order].split((groups - first).bincount().tolist())
        answers = [question(slab, part) for slab, part in zip(slabs, parts, strict=True)]
        found = [answer for answer in answers if answer is not None]
        return torch.cat(found)[order.argsort()] if found else answers[0]
