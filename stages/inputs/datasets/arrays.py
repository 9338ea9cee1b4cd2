"""Datasets that are arrays: the embedded digits, and torchvision's small ones."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import (
    ImageDataset,
    Skip,
    Split,
    digest,
    samples_of,
    shape_and_bytes,
)
from stages.inputs.datasets.skipping import skipped_numbers

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
}


def _from_array(
    name: str,
    split: Split,
    class_names: Iterable[str],
    labels: Any,
    images: Tensor,
    skips: Sequence[Skip],
) -> ImageDataset:
    images_digest = digest(shape_and_bytes(images))
    found = skipped_numbers(skips, len(images), f"{name} ({split})")
    if found:
        images = images.index_fill(0, samples_of(found, split), 0)
    return ImageDataset(
        name,
        split,
        tuple(class_names),
        torch.as_tensor(labels, dtype=torch.int64),
        images.__getitem__,
        images,
        images_digest,
        skips=tuple(found),
    )


def digits(split: Split, skips: Sequence[Skip] = ()) -> ImageDataset:
    here = Path(__file__).parent
    paths = [here / "digits.npz", here.parents[2] / "data" / "digits.npz"]  # installed, checkout
    try:
        path = next(p for p in paths if p.is_file())
    except StopIteration:
        raise DatasetError(
            f"the embedded digits are missing from {paths[-1].parent}", "Reinstall the package."
        ) from None
    with np.load(path, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1)
        labels = arrays[f"{split}_labels"]
        return _from_array("digits", split, "0123456789", labels, images, skips)


def torchvision_arrays(
    name: str,
    split: Split,
    root: str | None,
    download: bool,
    skips: Sequence[Skip] = (),
) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = os.path.expanduser(root or "data/downloads")
    try:
        source = getattr(tvd, TORCHVISION[name])(folder, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"{name} is missing or corrupt in {folder}: {str(error).splitlines()[0]}",
            "Point --root at it. Commands that train or cache, and evaluate, take --download.",
        ) from error
    data = torch.as_tensor(source.data)
    images = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
    return _from_array(name, split, source.classes, source.targets, images, skips)
