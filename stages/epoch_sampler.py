"""The samples of every epoch in the order of `train-student`, for a `DataLoader`."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from stages.cache.identity import differences
from stages.cached_dataset import CachedDataset
from stages.errors import ConfigError
from stages.order import held_out, view_order
from stages.targets.chunks import ChunkGroups, SlabPlan, groups_of_ranks


class EpochSampler(DistributedSampler[int]):
    """Indices of a `CachedDataset`: in every epoch one view of every sample, in a fresh order.

    The views of the cache take turns, in an order drawn anew each time round. View and order are
    functions of (seed, epoch), the ones of `pipeline train-student` with the same `seed.data`. Of
    several ranks each has its own samples, as many as the others; which, is drawn anew in every
    epoch. It is a `DistributedSampler` so that Lightning and others leave it in its place and call
    `set_epoch`.

    Parameters
    ----------
    dataset : CachedDataset
    seed : int
        What `seed.data` is to `train-student`.
    rank, world : int, optional
        Which of how many processes this is. If None, `torch.distributed` is asked at every use, so
        that the sampler may be made before the process group is; without a group this is the only
        process.
    val_fraction : float
        The share of the samples that is held out. They are in `held_out`, and never shown.

    Attributes
    ----------
    epoch : int
        Set by `set_epoch`.
    samples, held_out : Tensor
        int64, ascending: the samples that are shown, and those that are held out.

    Raises
    ------
    ConfigError
        If a rank is not in [0, world), or nothing is left to train on.
    """

    dataset: CachedDataset

    def __init__(
        self,
        dataset: CachedDataset,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        val_fraction: float = 0.0,
    ) -> None:
        # The parent's own __init__ would settle the ranks now.
        if (rank is None) != (world is None):
            raise ConfigError("rank and world belong together", "Give both, or neither.")
        if rank is not None and world is not None and not 0 <= rank < world:
            raise ConfigError(f"rank must be in [0, {world}), was {rank}")
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self.samples, self.held_out = held_out(
            dataset.num_samples, val_fraction, seed, dataset.images.skipped
        )
        self._given = None if rank is None or world is None else (rank, world)
        self._groups: ChunkGroups | None = None
        self._begin_at = self._handed_out = 0

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world): which of how many processes this is."""
        if self._given is not None:
            return self._given
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        """How many samples every rank has in an epoch."""
        groups = self.groups
        return len(self.samples) if groups is None else groups.smallest(self.samples)

    def __iter__(self) -> Iterator[int]:
        """The indices of this rank in the epoch that was set, or the rest of them after
        `load_state_dict`.
        """
        first = self.view(self.epoch) * self.dataset.num_samples
        indices = (first + self.order(self.epoch)).tolist()
        begin, self._begin_at = self._begin_at, 0
        self._handed_out = begin
        return self._counted(indices, begin)

    def _counted(self, indices: list[int], begin: int) -> Iterator[int]:
        for position in range(begin, len(indices)):
            self._handed_out = position + 1
            yield indices[position]

    def set_epoch(self, epoch: int) -> None:
        """Show this epoch, from 0, in the next pass; without it every pass is the same.

        After `load_state_dict` the epoch that was interrupted goes on where it was.
        """
        if epoch < 0:
            raise ConfigError(f"an epoch must not be negative, was {epoch}")
        if epoch != self.epoch:
            self.epoch, self._begin_at, self._handed_out = epoch, 0, 0

    def view(self, epoch: int) -> int:
        """The view that an epoch shows."""
        return view_order(self.seed, epoch, self.dataset.num_views)

    def order(self, epoch: int) -> Tensor:
        """int64 (n,): the samples of this rank in the order of an epoch."""
        plan = SlabPlan(self.groups, share=self.place[0])
        return plan.order(self.samples, self.seed, epoch)

    @property
    def groups(self) -> ChunkGroups | None:
        """How the rows of a view are divided among ranks; None for a single one."""
        world = self.place[1]
        if world == 1:
            return None
        if self._groups is None or self._groups.num_groups != world:
            cache = self.dataset.cache
            self._groups = groups_of_ranks(cache.row_of, cache.grid.chunk_rows, world)
        return self._groups

    def runs(self, epoch: int) -> list[slice] | None:
        """The rows of a view that this rank needs in an epoch; None for all of them."""
        if (groups := self.groups) is None:
            return None
        return groups.runs(groups.chunks(self.seed, epoch)[self.place[0]])

    # ---- resume -------------------------------------------------------------------------

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, for a checkpoint; the same on all ranks.

        Parameters
        ----------
        position : int, optional
            How many samples of this rank the loop is done with in this epoch: batches times batch
            size. If None, those that were handed out, which is more than that where a DataLoader
            has workers: they read ahead.

        Returns
        -------
        dict
            Plain integers: epoch, position, and what must be the same to go on.
        """
        position = self._handed_out if position is None else position
        turn, position = (1, 0) if position >= len(self) else (0, position)
        return {"epoch": self.epoch + turn, "position": position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the next pass where `state_dict` was taken.

        Raises
        ------
        ConfigError
            If the seed, the ranks, the views or the samples are others: so would be the order.
        """
        fixed = {name: state.get(name) for name in self._fixed()}
        if differing := differences(self._fixed(), fixed):
            raise ConfigError(
                f"this sampler cannot go on from that state: {'; '.join(differing)}",
                "Make it as it was, with the same number of processes.",
            )
        self.epoch = int(state["epoch"])
        self._begin_at = self._handed_out = int(state["position"])

    def _fixed(self) -> dict[str, Any]:
        dataset = self.dataset
        return {
            "seed": self.seed,
            "world": self.place[1],
            "samples": len(self.samples),
            "views": dataset.num_views,
            "cache": dataset.cache.identity.digest(),
        }
