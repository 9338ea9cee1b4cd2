"""Images and labels by name: what a dataset is, whatever it was made from.

Small images of one size are decoded once into a uint8 tensor; anything else is loaded one by one
(`feed.py` does that in workers). A dataset's digests do not depend on which of the two it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from stages.errors import DatasetError
from stages.inputs.datasets.callables import from_callable
from stages.inputs.datasets.dataset import (
    PUBLISHED_STATISTICS,
    SOURCES,
    WALKED,
    ImageDataset,
    PassedOver,
    Skip,
    Source,
    Split,
    Statistics,
)
from stages.inputs.datasets.skipping import read_skip_list
from stages.registry import import_all
from stages.settings import Feeding

__all__ = [
    "PUBLISHED_STATISTICS",
    "SOURCES",
    "ImageDataset",
    "Skip",
    "Source",
    "Split",
    "Statistics",
    "load_dataset",
    "load_splits",
    "passed_over",
    "read_skip_list",
]

import_all(__name__)


class Reading(TypedDict, total=False):
    """How a dataset is read, see `Source`. skips: of any split; the
    first that speaks of a sample counts.
    """

    root: str | None
    feeding: Feeding
    download: bool
    rescan: bool
    skips: Sequence[Skip]


def load_dataset(spec: str, split: Split, **reading: Unpack[Reading]) -> ImageDataset:
    """One split of `digits`, `cifar10`, `cifar100`, `fashion-mnist`, `imagenet`, `folder:DIR`,
    `hf:DIR` or `module:callable`.

    Raises DatasetError if it is missing, unreadable, or has fewer than two classes.
    """
    kind, colon, argument = spec.partition(":")
    read = SOURCES.get(f"{kind}{colon}") or (from_callable if argument else None)
    if read is None:
        known = (f"{name}DIR" if name.endswith(":") else name for name in sorted(SOURCES))
        raise DatasetError(
            f"unknown dataset '{spec}'", f"Known: {', '.join(known)}, module:callable."
        )
    given = Source(spec, split, **reading)
    skips = [skip for skip in given.skips if skip.split == split]
    dataset = read(replace(given, skips=skips))
    labels = dataset.labels
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.class_names):
        raise DatasetError(
            f"dataset '{spec}' ({split}) has labels from {int(labels.min())} to "
            f"{int(labels.max())} for {len(dataset.class_names)} classes",
            "Labels count from 0; give one class name a label.",
        )
    if len(dataset.class_names) < 2 or not len(dataset):
        raise DatasetError(
            f"dataset '{spec}' ({split}) has {len(dataset)} images in "
            f"{len(dataset.class_names)} class(es)",
            "Distillation needs at least two classes with images.",
        )
    return dataset


def passed_over(source: Source) -> list[PassedOver]:
    """The files of a split's folder that are not taken; none for datasets without a folder."""
    kind, colon, _ = source.spec.partition(":")
    walk = WALKED.get(f"{kind}{colon}")
    return [] if walk is None else walk(source)


def load_splits(spec: str, **reading: Unpack[Reading]) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test split, which must have the same classes. Raises DatasetError."""
    train, test = (load_dataset(spec, split, **reading) for split in ("train", "test"))
    if train.class_names != test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))
        raise DatasetError(
            f"the classes of {spec}'s training and test split differ: {', '.join(only[:5])}",
            "Both splits need the same classes under the same names.",
        )
    if train.shape[0] != test.shape[0]:
        raise DatasetError(
            f"{spec}'s training images have {train.shape[0]} channel(s), its test images "
            f"{test.shape[0]}",
            "Convert them alike, to grey or to colour.",
        )
    return train, test
