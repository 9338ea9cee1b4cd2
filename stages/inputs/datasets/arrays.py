"""Datasets that are arrays: the embedded digits, and torchvision's small ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import ImageDataset, Split, digest, shape_and_bytes

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
}


def _from_array(
    name: str, split: Split, class_names: Iterable[str], labels: Any, images: Tensor
) -> ImageDataset:
    images_digest = digest(shape_and_bytes(images))
    return ImageDataset(
        name,
        split,
        tuple(class_names),
        torch.as_tensor(labels, dtype=torch.int64),
        images.__getitem__,
        images,
        images_digest,
    )


def digits(split: Split) -> ImageDataset:
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
        return _from_array("digits", split, "0123456789", arrays[f"{split}_labels"], images)


def torchvision_arrays(name: str, split: Split, root: str | None, download: bool) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = root or "data/downloads"
    try:
        source = getattr(tvd, TORCHVISION[name])(folder, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"{name} is missing or corrupt in {folder}: {str(error).splitlines()[0]}",
            "Point --root at it. Commands that train or cache, and evaluate, take --download.",
        ) from error
    data = torch.as_tensor(source.data)
    images = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
    return _from_array(name, split, source.classes, source.targets, images)
