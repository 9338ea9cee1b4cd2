"""An epoch in groups of chunks, where one view's targets are more than memory should hold.

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

from stages.errors import ConfigError
from stages.inputs.counter_hash import permute
from stages.training.order import SampleOrder, Stream, sample_order


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
        return -(-len(self.row_of) // self.chunk_rows)

    @property
    def num_groups(self) -> int:
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

    def order_of_group(self, group: int, shown: int) -> SampleOrder:
        """Of the samples of one group, whichever chunks it draws: the first `shown` of them."""

        def order(samples: Tensor, seed: int, epoch: int) -> Tensor:
            shuffled = sample_order(samples, seed, epoch)
            return shuffled[self.group_of(seed, epoch)[shuffled] == group][:shown]

        return order

    def smallest(self, samples: Tensor) -> int:
        """How many of these samples every group has at least, whichever chunks it draws."""
        counts = self.chunk_of[samples].bincount(minlength=self.num_chunks)
        return int(counts.sort().values[: self.num_chunks // self.num_groups].sum())
