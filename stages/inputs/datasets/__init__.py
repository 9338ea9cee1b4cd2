"""Images and labels by name: what a dataset is, whatever it was made from.

Small images of one size are decoded once into a uint8 tensor; anything else is loaded one by one
(`feed.py` does that in workers). A dataset's digests do not depend on which of the two it is.
"""

from collections.abc import Iterable
from pathlib import Path

from stages.errors import DatasetError
from stages.inputs.datasets.arrays import TORCHVISION, digits, torchvision_arrays
from stages.inputs.datasets.callables import from_callable
from stages.inputs.datasets.dataset import (
    PUBLISHED_STATISTICS,
    ImageDataset,
    Skip,
    Split,
    Statistics,
)
from stages.inputs.datasets.files import folder, imagenet
from stages.inputs.datasets.hf import hugging_face
from stages.inputs.datasets.skipping import read_skip_list
from stages.settings import Feeding

__all__ = [
    "PUBLISHED_STATISTICS",
    "ImageDataset",
    "Skip",
    "Split",
    "Statistics",
    "load_dataset",
    "load_splits",
    "read_skip_list",
]


def load_dataset(
    spec: str,
    split: Split,
    root: str | None = None,
    feeding: Feeding = "auto",
    download: bool = False,
    rescan: bool = False,
    skips: Iterable[Skip] = (),
) -> ImageDataset:
    """One split of `digits`, `cifar10`, `cifar100`, `fashion-mnist`, `imagenet`, `folder:DIR`,
    `hf:DIR` or `module:callable`. rescan: list folders of images again, see `manifest.py`. skips:
    samples to leave out, of any split; the first that speaks of a sample counts.

    Raises DatasetError if it is missing, unreadable, or has fewer than two classes.
    """
    kind, _, argument = spec.partition(":")
    mine = [skip for skip in skips if skip.split == split]
    if kind == "folder":
        dataset = folder(Path(argument), split, feeding, rescan, mine)
    elif kind == "hf":
        dataset = hugging_face(Path(argument), split, feeding, mine)
    elif spec == "digits":
        dataset = digits(split, mine)
    elif spec in TORCHVISION:
        dataset = torchvision_arrays(spec, split, root, download, mine)
    elif spec == "imagenet":
        dataset = imagenet(split, root, feeding, rescan, mine)
    elif argument:
        dataset = from_callable(spec, split, feeding, mine)
    else:
        raise DatasetError(
            f"unknown dataset '{spec}'",
            "Known: digits, cifar10, cifar100, fashion-mnist, imagenet, folder:DIR, hf:DIR, "
            "module:callable.",
        )
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


def load_splits(
    spec: str,
    root: str | None = None,
    feeding: Feeding = "auto",
    download: bool = False,
    rescan: bool = False,
    skips: Iterable[Skip] = (),
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test split, which must have the same classes."""
    skips = list(skips)
    train = load_dataset(spec, "train", root, feeding, download, rescan, skips)
    test = load_dataset(spec, "test", root, feeding, download, rescan, skips)
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
