"""Datasets that somebody's own code returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import (
    Feeding,
    ImageDataset,
    Skip,
    Split,
    digest,
    fixed_sample,
    in_memory,
    shape_and_bytes,
)
from stages.inputs.datasets.skipping import blackened, skipped_numbers
from stages.inputs.imported import imported

MOST_CLASSES = 2**20


@dataclass(frozen=True)
class _MapStyle:
    """Loads from a map-style dataset of (image, label): PIL image, array (H, W[, C]) or tensor."""

    source: Any

    def __call__(self, index: int) -> Tensor:
        image = self.source[index][0]
        if not isinstance(image, Tensor):
            pixels = np.array(image)
            image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
            image = image.permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise DatasetError(
                f"image {index} is {image.dtype} of shape {tuple(image.shape)}",
                "Return PIL images or uint8 pixels: (C, H, W) tensors or (H, W, C) arrays.",
            )
        return image


def from_callable(
    spec: str, split: Split, feeding: Feeding, skips: Sequence[Skip] = ()
) -> ImageDataset:
    source = imported(spec, "dataset", DatasetError)(split)
    size = len(source)
    labels = getattr(source, "targets", None)
    if labels is None:
        labels = [float(source[i][1]) for i in range(size)]
    given = torch.as_tensor(labels)
    labels = given.to(torch.int64)
    if not torch.equal(labels.double(), given.double()) or (labels > MOST_CLASSES).any():
        raise DatasetError(
            f"dataset '{spec}' ({split}) has labels that are no class numbers",
            f"Labels are integers that count from 0, below {MOST_CLASSES:,}.",
        )
    if len(labels) != size:
        raise DatasetError(
            f"dataset '{spec}' ({split}) has {size} images and {len(labels)} labels",
            "Its `targets` need one label an image.",
        )
    class_names = getattr(source, "classes", None)
    if class_names is None:
        class_names = [str(c) for c in range(int(labels.max()) + 1 if size else 0)]
    source_of, found = _MapStyle(source), skipped_numbers(skips, size, f"{spec} ({split})")
    load = blackened(source_of, found, size)
    return ImageDataset(
        spec,
        split,
        tuple(map(str, class_names)),
        labels,
        load,
        in_memory(load, size, feeding),
        digest(part for i in fixed_sample(size) for part in shape_and_bytes(source_of(i))),
        skips=tuple(found),
    )
