"""The order of views and samples: pure functions of (seed.data, epoch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from stages.inputs.counter_hash import permute


class Stream(IntEnum):
    """What seed.data draws, each for itself. 4 is the order of rows, which is the view seed's:
    `stages.cache_job`.
    """

    SAMPLES = 1
    VIEWS = 2
    HELD_OUT = 3
    CHUNKS = 5
    FOLDS = 6


SampleOrder = Callable[[Tensor, int, int], Tensor]
"""(samples, seed.data, epoch) -> the samples in the order of that epoch; see `sample_order`."""


def sample_order(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """The training samples in the order of an epoch: int64, a permutation of `samples`."""
    positions = torch.arange(len(samples))
    return samples[permute(positions, len(samples), seed, epoch, Stream.SAMPLES)]


def view_order(seed: int, epoch: int, num_views: int) -> int:
    """Which of `num_views` views an epoch shows: a fresh permutation each time round."""
    turn, position = divmod(epoch, num_views)
    return int(permute(torch.tensor([position]), num_views, seed, turn, Stream.VIEWS))


@dataclass(frozen=True)
class ViewSchedule:
    """Which views each epoch of a run shows. choices: what one epoch may show: a view, or the views
    of a sample that are seen at once. seed: seed.data.
    """

    choices: Sequence[tuple[int, ...]]
    seed: int
    epochs: int

    def of_epoch(self, epoch: int) -> tuple[int, ...]:
        """The views of an epoch, which counts from 0."""
        return self.choices[view_order(self.seed, epoch, len(self.choices))]
