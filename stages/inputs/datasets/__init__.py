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
    TESTED_ELSEWHERE,
    WALKED,
    ImageDataset,
    PassedOver,
    Skip,
    Source,
    Split,
    Statistics,
)
from stages.inputs.datasets.nvjpeg import check_usable
from stages.inputs.datasets.parts import (
    no_images,
    part_of,
    share_of,
    skips_of_whole,
    without_labels,
)
from stages.inputs.datasets.skipping import read_skip_list
from stages.registry import import_all
from stages.settings import Decoder, Feeding

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
    test: str | None
    no_labels: bool
    exif: bool
    jpeg_side: int | None
    decoder: Decoder | None


def load_dataset(spec: str, split: Split, **reading: Unpack[Reading]) -> ImageDataset:
    """One split of `digits`, `cifar10`, `cifar100`, `fashion-mnist`, `imagenet`, `folder:DIR`,
    `hf:DIR`, `wds:PATTERN` or `module:callable`. Without labels, training images have no class
    names.

    Raises DatasetError if it is missing, unreadable, or has fewer than two classes.
    """
    given = Source(spec, split, **reading)
    share = share_of(given.test)
    if split == "test" and given.test == "none":
        return no_images(spec, split)
    if share:
        skips = skips_of_whole(given.skips, spec)
        return part_of(_read(replace(given, split="train", skips=skips)), split, share)
    return _read(replace(given, skips=[skip for skip in given.skips if skip.split == split]))


def _read(source: Source) -> ImageDataset:
    """One split of a dataset, as it lies there."""
    spec, split = source.spec, source.split
    kind, colon, argument = spec.partition(":")
    read = SOURCES.get(f"{kind}{colon}") or (from_callable if argument else None)
    if read is None:
        known = (f"{name}DIR" if name.endswith(":") else name for name in sorted(SOURCES))
        raise DatasetError(
            f"unknown dataset '{spec}'", f"Known: {', '.join(known)}, module:callable."
        )
    if split == "test" and source.test is not None and f"{kind}:" not in TESTED_ELSEWHERE:
        raise DatasetError(
            f"--test {source.test} is a folder, and '{spec}' is none",
            "--test takes none, a share such as 0.1, or, with folder:DIR or wds:PATTERN, another.",
        )
    if source.decoder is not None:
        check_usable()
    dataset = read(source)
    if source.decoder is not None and dataset.decoder is None:
        raise DatasetError(
            f"--decoder is for JPEG files; '{spec}' gives pixels", "Leave --decoder out."
        )
    if source.exif and not dataset.exif:
        raise DatasetError(
            f"--exif is for compressed images; '{spec}' gives pixels", "Leave --exif out."
        )
    if source.jpeg_side is not None and dataset.jpeg_side is None:
        raise DatasetError(
            f"--jpeg-side is for compressed images; '{spec}' gives pixels",
            "Leave --jpeg-side out.",
        )
    if split == "train" and source.no_labels:
        dataset = without_labels(dataset)
    _check_classes(dataset, spec)
    return dataset


def _check_classes(dataset: ImageDataset, spec: str) -> None:
    labels, classes, split = dataset.labels, len(dataset.class_names), dataset.split
    if not dataset.labelled:
        return
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DatasetError(
            f"dataset '{spec}' ({split}) has labels from {int(labels.min())} to "
            f"{int(labels.max())} for {classes} classes",
            "Labels count from 0; give one class name a label.",
        )
    if classes < 2 or not len(dataset):
        raise DatasetError(
            f"dataset '{spec}' ({split}) has {len(dataset)} images in {classes} class(es)",
            "Distillation needs at least two classes with images. Images without classes need "
            "--no-labels.",
        )


def passed_over(source: Source) -> list[PassedOver]:
    """The files of a split's folder that are not taken; none for datasets without a folder."""
    kind, colon, _ = source.spec.partition(":")
    walk = WALKED.get(f"{kind}{colon}")
    return [] if walk is None else walk(source)


def load_splits(
    spec: str, eval_dataset: str | None = None, **reading: Unpack[Reading]
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test split, which must have the same classes; without labels the
    training split takes those of the test split. The latter is empty where nothing is tested on.
    eval_dataset: whose test split it is, if not the same dataset's. Raises DatasetError.
    """
    of_train = reading.copy()
    if eval_dataset is not None:
        of_train["test"] = "none"
    train = load_dataset(spec, "train", **of_train)
    test = load_dataset(eval_dataset or spec, "test", **reading)
    if not train.labelled:
        return replace(train, class_names=test.class_names), test
    if not len(test):
        return train, replace(test, class_names=train.class_names)
    if train.class_names != test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names)) or ["their order"]
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
