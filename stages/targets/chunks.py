"""How much memory targets may take, and an epoch in groups of chunks where a view takes more.

A view's rows are a random permutation of the samples, so that any of its chunks is a fair draw. An
epoch draws the chunks in an order of its own, cuts them into groups that fit, and shuffles the
samples within a group. The order is a pure function of (seed.data, epoch, size of a group): a run
can stop and go on anywhere, and runs that read no targets see the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.distributed import Ranks
from stages.errors import ConfigError
from stages.inputs.counter_hash import permute
from stages.order import Stream, ViewSchedule, sample_order
from stages.settings import StudentConfig
from stages.sizes import in_words
from stages.targets.memory import free_memory


def groups_of_ranks(row_of: Tensor, chunk_rows: int, world: int) -> "ChunkGroups":
    """One group for each rank: pieces of about a chunk, as many for every rank, drawn anew in every
    epoch. Raises ConfigError for more ranks than rows can be cut for.
    """
    rows = len(row_of)
    for pieces in range(max(1, round(rows / world / chunk_rows)), 0, -1):
        groups = ChunkGroups(row_of, -(-rows // (world * pieces)), pieces)
        if groups.num_chunks == world * pieces:
            return groups
    raise ConfigError(
        f"{rows} samples cannot be divided among {world} processes", "Start fewer processes."
    )


@dataclass(frozen=True)
class ChunkGroups:
    """How a view is cut.

    row_of: int64 (N,), the row of each sample. chunk_rows: the rows of a chunk; the last may be
    shorter. most: how many chunks a group may have. Groups are as even as possible.
    """

    row_of: Tensor
    chunk_rows: int
    most: int

    @property
    def num_chunks(self) -> int:
        """How many chunks a view has."""
        return -(-len(self.row_of) // self.chunk_rows)

    @property
    def num_groups(self) -> int:
        """How many groups an epoch has."""
        return -(-self.num_chunks // self.most)

    @cached_property
    def chunk_of(self) -> Tensor:
        """int64 (N,): the chunk in which each sample's row lies."""
        return self.row_of // self.chunk_rows

    def chunks(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        """The chunks of every group of an epoch, ascending, so that files are read forwards."""
        every = torch.arange(self.num_chunks)
        drawn = permute(every, self.num_chunks, seed, epoch, Stream.CHUNKS)
        return [tuple(sorted(group.tolist())) for group in drawn.tensor_split(self.num_groups)]

    def runs(self, chunks: Sequence[int]) -> list[slice]:
        """The rows of some chunks, chunk by chunk."""
        starts = [chunk * self.chunk_rows for chunk in chunks]
        return [slice(s, min(s + self.chunk_rows, len(self.row_of))) for s in starts]

    def group_of(self, seed: int, epoch: int) -> Tensor:
        """int64 (N,): the group that shows each sample in an epoch."""
        of_chunk = torch.empty(self.num_chunks, dtype=torch.int64)
        for number, group in enumerate(self.chunks(seed, epoch)):
            of_chunk[list(group)] = number
        return of_chunk[self.chunk_of]

    def order(self, samples: Tensor, seed: int, epoch: int) -> Tensor:
        """`samples` (int64) in the order of an epoch: group by group, shuffled within each."""
        shuffled = sample_order(samples, seed, epoch)
        return shuffled[self.group_of(seed, epoch)[shuffled].argsort(stable=True)]

    def order_of_group(self, group: int, samples: Tensor, seed: int, epoch: int) -> Tensor:
        """Of `samples` those of one group, shuffled: as many in every epoch, whichever chunks the
        group draws.
        """
        shuffled = sample_order(samples, seed, epoch)
        mine = shuffled[self.group_of(seed, epoch)[shuffled] == group]
        return mine[: self.smallest(samples)]

    def smallest(self, samples: Tensor) -> int:
        """How many of these samples every group has at least, whichever chunks it draws."""
        counts = self.chunk_of[samples].bincount(minlength=self.num_chunks)
        return int(counts.sort().values[: self.num_chunks // self.num_groups].sum())


# ---- memory -----------------------------------------------------------------------------

RESIDENT_BYTES = 2**30
"""Slabs of all views are kept where they take no more together; on a GPU see `resident_bytes`."""


def available_bytes(device: torch.device) -> int:
    """Memory that is free where targets are held: on the GPU, or what this process may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def slab_bytes(caches: Sequence[LogitCache], rows: int, views: int = 1) -> int:
    """Bytes of memory of `rows` rows of each of `views` views, of all caches together. The views
    share labels, the rows of samples, and what they are coded beside.

    Counted with a rectification, whether one is used or not: the order of samples is then the same
    for every student of a cache. Not counted is a byte a row for `ViewTargets.mistakes`: groups,
    and with them the order of runs that were started before, would be others.
    """
    index = torch.int64.itemsize * (caches[0].num_samples + rows)
    shared = [rows * cache.anchor_row_bytes + index for cache in caches]
    own = [rows * (cache.row_bytes - cache.anchor_row_bytes) for cache in caches]
    return views * sum(own) + sum(shared)


def resident_bytes(device: torch.device) -> int:
    """How much the targets of all views may take and be kept. Views are read whole either way, so
    that no result depends on it.
    """
    if device.type != "cuda":
        return RESIDENT_BYTES
    return max(RESIDENT_BYTES, available_bytes(device) // 4)


@dataclass(frozen=True)
class SlabPlan:
    """How targets are read. groups: None where views are read whole. resident: all views are kept
    once they were read. share: the only group of every epoch that this process reads, as each of
    several ranks has its own.
    """

    groups: ChunkGroups | None = None
    resident: bool = False
    share: int | None = None

    def order(self, samples: Tensor, seed: int, epoch: int) -> Tensor:
        """The samples in the order of an epoch in which targets are read like this: int64."""
        if self.groups is None:
            return sample_order(samples, seed, epoch)
        if self.share is None:
            return self.groups.order(samples, seed, epoch)
        return self.groups.order_of_group(self.share, samples, seed, epoch)


def plan_of_rank(cache: LogitCache, ranks: Ranks) -> SlabPlan:
    """How one of several ranks reads its own group of every epoch; see `groups_of_ranks`."""
    groups = groups_of_ranks(cache.row_of, cache.grid.chunk_rows, ranks.world)
    return SlabPlan(groups, share=ranks.rank)


def plan_slabs(
    caches: Sequence[LogitCache],
    schedule: ViewSchedule,
    samples: Tensor,
    config: StudentConfig,
    device: torch.device,
    readings: int = 1,
) -> SlabPlan:
    """How to read views so that targets take no more than `config.slab_memory` on `device`: the
    slab in use and the next.

    schedule: what epochs show; two views that a loss sees at once are not read in groups: no memory
    is given then. samples: int64, those that are trained on. readings: of how many rectifications,
    each read for itself; 0 where no targets are read. Raises ConfigError, naming a memory that
    works, where it is too small, or where none is given and half of what is available is. An order
    of samples must depend on the seed and not on the machine: so it is not chosen silently.
    """
    budget = config.slab_bytes
    if budget is None and not readings:
        return SlabPlan()
    choices, per_decode = schedule.choices, min(schedule.per_decode, schedule.epochs)
    num_views = len({view for some in choices for view in some})
    samples_of_view, slab = caches[0].num_samples, per_decode * len(choices[0])
    held = min(2 * slab, num_views)
    needed, marks = slab_bytes(caches, samples_of_view, held), len(caches) * samples_of_view
    every = slab_bytes(caches, samples_of_view, num_views) + num_views * marks
    most = resident_bytes(device)
    # Rounds put views together anew in every turn: slabs of all of them would be kept forever.
    resident = per_decode == 1 and every <= (most if budget is None else min(most, budget))
    resident &= readings <= 1  # together they might be too much to keep
    whole, half = needed + held * marks, available_bytes(device) // 2
    if budget is None and whole > half:
        raise ConfigError(
            f"the targets of {held} views take {in_words(whole)}, more than half of "
            f"the {in_words(2 * half)} that are free",
            f"Give --slab-memory {in_words(half)} to read and shuffle groups of chunks, or as much "
            "as there is."
            if len(choices[0]) == 1
            else "Free memory, or use a loss that sees one view of a sample at a time.",
        )
    if resident or budget is None or needed <= budget:
        return SlabPlan(None, resident)
    return SlabPlan(_chunk_groups(caches, slab, budget, samples, config.train.batch_size))


def _chunk_groups(
    caches: Sequence[LogitCache], views: int, budget: int, samples: Tensor, batch_size: int
) -> ChunkGroups:
    """The largest groups of which two fit, each of so many views."""
    cache = caches[0]
    if any(not torch.equal(c.dataset_index, cache.dataset_index) for c in caches[1:]):
        raise ConfigError(
            "caches whose rows lie in different orders cannot be read in groups",
            "Leave --slab-memory out, or make it large enough for whole views.",
        )
    chunk_rows = cache.grid.chunk_rows

    def groups(most: int) -> ChunkGroups:
        return ChunkGroups(cache.row_of, chunk_rows, most)

    def holds_a_batch(most: int) -> bool:  # a batch may lie across two groups, never three
        return groups(most).smallest(samples) > batch_size

    empty = slab_bytes(caches, 0, views)
    most = (budget // 2 - empty) // (slab_bytes(caches, chunk_rows, views) - empty)
    if most >= 1 and holds_a_batch(most):
        return groups(most)
    chunks = next(filter(holds_a_batch, range(1, groups(1).num_chunks)), groups(1).num_chunks)
    least = 2 * slab_bytes(caches, min(chunks * chunk_rows, cache.num_samples), views)
    raise ConfigError(
        f"a slab memory of {in_words(budget)} is too small: two groups of whole chunks "
        f"({chunk_rows} rows each), no smaller than a batch, take {in_words(least)}",
        f"Give --slab-memory {in_words(least)} or more.",
    )
