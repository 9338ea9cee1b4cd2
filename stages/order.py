"""The order of views and samples, and which are held out: pure functions of (seed.data, epoch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from stages.errors import ConfigError
from stages.inputs.counter_hash import permute
from stages.inputs.datasets.dataset import without


class Stream(IntEnum):
    """What seed.data draws, each for itself. 4 is the order of rows, which is the view seed's:
    `stages.teacher.job`.
    """

    SAMPLES = 1
    VIEWS = 2
    HELD_OUT = 3
    CHUNKS = 5
    FOLDS = 6


def held_out(
    num_samples: int, fraction: float, seed: int, skipped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Training and held-out samples: int64, each in dataset order, disjoint; none that is skipped.

    Raises ConfigError if there is nothing to hold out, or nothing left to train on.
    """
    shuffled = permute(torch.arange(num_samples), num_samples, seed, Stream.HELD_OUT)
    if skipped is not None:
        shuffled = without(shuffled, skipped)
        num_samples = len(shuffled)
    out = round(num_samples * fraction)
    if num_samples - out < 2 or (fraction > 0 and out == 0):
        raise ConfigError(
            f"data.val_fraction {fraction:g} of {num_samples} samples leaves {num_samples - out} "
            f"for training and {out} held out"
        )
    return shuffled[out:].sort().values, shuffled[:out].sort().values


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
class Round:
    """Epochs that are shown from one decode of every image, each image in a view for every epoch.

    first: its first epoch, whose order of samples is that of the round. count: how many it has.
    place: which of them the epoch at hand is.
    """

    first: int
    count: int = 1
    place: int = 0

    @property
    def epochs(self) -> range:
        """All of its epochs."""
        return range(self.first, self.first + self.count)


SINGLE = Round(0)
"""The round of an epoch that shares its images with none."""


@dataclass(frozen=True)
class Rounds:
    """Rounds of up to `per_decode` epochs. A round ends early with the run, and where all of
    `num_views` were shown: no view is in it twice. So a run shows every image in the views that it
    has in a run of single epochs, in another order.

    num_views: what there is to show, None for unbounded. Raises ConfigError if that is less than a
    round.
    """

    per_decode: int = 1
    epochs: int | None = None
    num_views: int | None = None

    def __post_init__(self) -> None:
        if self.num_views is not None and self.num_views < self.per_decode:
            raise ConfigError(
                f"train.views_per_decode is {self.per_decode}, and views to show: {self.num_views}",
                f"Give --views-per-decode {self.num_views} or less, or show more views.",
            )

    def of(self, epoch: int) -> Round:
        """The round of an epoch."""
        turn, position = divmod(epoch, self.num_views) if self.num_views else (0, epoch)
        place = position % self.per_decode
        first, ends = epoch - place, [epoch - place + self.per_decode]
        if self.num_views:
            ends.append((turn + 1) * self.num_views)
        if self.epochs is not None:
            ends.append(self.epochs)
        return Round(first, min(ends) - first, place)


SINGLES = Rounds()
"""Every epoch for itself."""


@dataclass(frozen=True)
class ViewSchedule:
    """Which views each epoch of a run shows. choices: what one epoch may show: a view, or the views
    of a sample that are seen at once. seed: seed.data. per_decode: epochs of a round, at the most.
    Raises ConfigError where these are more than there are choices.
    """

    choices: Sequence[tuple[int, ...]]
    seed: int
    epochs: int
    per_decode: int = 1

    def __post_init__(self) -> None:
        _ = self.rounds

    @cached_property
    def rounds(self) -> Rounds:
        """The epochs whose views are made of the same decoded images."""
        return Rounds(self.per_decode, self.epochs, len(self.choices))

    def of_epoch(self, epoch: int) -> tuple[int, ...]:
        """The views of an epoch, which counts from 0: those of its round, epoch after epoch."""
        every = len(self.choices)
        chosen = (view_order(self.seed, each, every) for each in self.rounds.of(epoch).epochs)
        return tuple(view for choice in chosen for view in self.choices[choice])
