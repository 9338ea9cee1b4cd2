"""Parts of a dataset: a share that is tested on, images without their labels, no images at all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.counter_hash import class_by_class
from stages.inputs.datasets.dataset import ImageDataset, Skip, Split, unlabelled

_SHARE_ORDER = 0x7E57
"""Key of the permutation that a share is drawn by: the same for every seed of a run."""


@runtime_checkable
class Divisible(Protocol):
    """What loads images and can be had for some of them alone."""

    def taking(self, samples: Sequence[int]) -> Callable[[int], Tensor]:
        """What loads the i-th of these samples."""


@dataclass(frozen=True)
class Taken:
    """Loads the i-th of some samples."""

    load: Callable[[int], Tensor]
    samples: tuple[int, ...]

    def __call__(self, index: int) -> Tensor:
        """uint8 (C, H, W)."""
        return self.load(self.samples[index])


def share_of(test: str | None) -> float:
    """The share of the training images that is tested on; 0 where `test` says something else.

    Raises DatasetError for a number that is no share.
    """
    try:
        share = float(test or "x")
    except ValueError:
        return 0.0
    if not 0 < share < 1:
        raise DatasetError(
            f"--test {test} is no share of the training images",
            "A share is more than 0 and less than 1, such as 0.1.",
        )
    return share


def share_mask(labels: Tensor, share: float) -> Tensor:
    """bool (N,): which samples are tested on, the same share of every class. labels: int64 (N,).

    Of n images of a class round(n * share), but at least one, and not all. Which of them is drawn
    by a fixed key: it depends on the labels and the share alone.
    """
    order = class_by_class(labels, _SHARE_ORDER)
    counts = labels.bincount()
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    wanted = (counts * share).round().long().clamp(min=1)
    return rank < torch.minimum(wanted, (counts - 1).clamp(min=0))[labels]


def part_of(whole: ImageDataset, split: Split, share: float) -> ImageDataset:
    """The training or the test split of a dataset of which a share is tested on. Raises
    DatasetError where nothing would be left of either.
    """
    if not whole.labelled:
        raise DatasetError(
            f"{whole.name} has no labels: a share of it cannot be tested on",
            "Give --test none, or --eval-dataset with labelled images.",
        )
    tested = share_mask(whole.labels, share)
    samples = (tested if split == "test" else ~tested).nonzero().squeeze(1)
    if not len(samples):
        raise DatasetError(
            f"--test {share:g} of {len(whole)} images leaves none for the {split} split",
            "Give another share; a class needs two images.",
        )
    chosen = samples.tolist()
    place = {sample: i for i, sample in enumerate(chosen)}
    skips = tuple(
        Skip(split, place[skip.sample], skip.path, skip.bytes)
        for skip in whole.skips
        if skip.sample is not None and skip.sample in place
    )
    return replace(
        whole,
        split=split,
        labels=whole.labels[samples],
        load=taking(whole.load, chosen),
        images=None if whole.images is None else whole.images[samples],
        notes=whole.notes if split == "train" else (),
        skips=skips,
        tested_share=share,
    )


def taking(load: Callable[[int], Tensor], samples: Sequence[int]) -> Callable[[int], Tensor]:
    """What loads the i-th of some samples."""
    return load.taking(samples) if isinstance(load, Divisible) else Taken(load, tuple(samples))


def skips_of_whole(skips: Iterable[Skip], spec: str) -> list[Skip]:
    """What either part leaves out, of the whole. Raises DatasetError where a sample is named by its
    number in one of them.
    """
    named = []
    for skip in skips:
        if skip.path is None:
            raise DatasetError(
                f"with a share for --test, a skip list names files, and not {skip.name} of {spec}",
                "Remove such images from the dataset, or leave --test out.",
            )
        named.append(Skip("train", None, skip.path, skip.bytes))
    return named


def without_labels(dataset: ImageDataset) -> ImageDataset:
    """The images alone."""
    return replace(dataset, labels=unlabelled(len(dataset)), class_names=(), labelled=False)


def no_images(name: str, split: Split) -> ImageDataset:
    """A split without images: nothing is tested on."""
    return ImageDataset(name, split, (), torch.empty(0, dtype=torch.int64), _nothing, None, "")


def _nothing(index: int) -> Tensor:
    raise IndexError(f"there is no image {index}: the split is empty")
