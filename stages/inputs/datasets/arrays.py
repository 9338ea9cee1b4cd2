"""Datasets that are arrays: the embedded digits, and torchvision's small ones."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import (
    ImageDataset,
    Source,
    dataset,
    digest,
    samples_of,
    shape_and_bytes,
)
from stages.inputs.datasets.skipping import skipped_numbers


def _from_array(
    source: Source, class_names: Iterable[str], labels: Any, images: Tensor
) -> ImageDataset:
    split, images_digest = source.split, digest(shape_and_bytes(images))
    found = skipped_numbers(source.skips, len(images), f"{source.spec} ({split})")
    if found:
        images = images.index_fill(0, samples_of(found, split), 0)
    return ImageDataset(
        source.spec,
        split,
        tuple(class_names),
        torch.as_tensor(labels, dtype=torch.int64),
        images.__getitem__,
        images,
        images_digest,
        skips=tuple(found),
    )


@dataset("digits", whole=True)
def digits(source: Source) -> ImageDataset:
    """The embedded handwritten digits, 8 x 8 grey pixels. Raises DatasetError."""
    here = Path(__file__).parent
    paths = [here / "digits.npz", here.parents[2] / "data" / "digits.npz"]  # installed, checkout
    try:
        path = next(p for p in paths if p.is_file())
    except StopIteration:
        raise DatasetError(
            f"the embedded digits are missing from {paths[-1].parent}", "Reinstall the package."
        ) from None
    with np.load(path, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"{source.split}_images"]).unsqueeze(1)
        return _from_array(source, "0123456789", arrays[f"{source.split}_labels"], images)


@dataset("cifar10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), whole=True)
def cifar10(source: Source) -> ImageDataset:
    """CIFAR-10 of torchvision. Raises DatasetError."""
    return _from_torchvision(source, "CIFAR10")


@dataset("cifar100", ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)), whole=True)
def cifar100(source: Source) -> ImageDataset:
    """CIFAR-100 of torchvision. Raises DatasetError."""
    return _from_torchvision(source, "CIFAR100")


@dataset("fashion-mnist", ((0.2860,), (0.3530,)), whole=True)
def fashion_mnist(source: Source) -> ImageDataset:
    """FashionMNIST of torchvision. Raises DatasetError."""
    return _from_torchvision(source, "FashionMNIST")


def _from_torchvision(source: Source, name: str) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = os.path.expanduser(source.root or "data/downloads")
    make = getattr(tvd, name)
    try:
        found = make(folder, train=source.split == "train", download=source.download)
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"{source.spec} is missing or corrupt in {folder}: {str(error).splitlines()[0]}",
            "Point --root at it. Commands that train or cache, and evaluate, take --download.",
        ) from error
    data = torch.as_tensor(found.data)
    images = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
    return _from_array(source, found.classes, found.targets, images)
