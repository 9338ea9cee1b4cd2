"""Images of CIFAR's shape without a download: a smooth prototype for each class, and noise.

    pipeline train-teacher --dataset benchmarks.synthetic:images ...

Speed does not depend on what is in an image. How small `klt` makes a row does: these logits are
easier than those of photographs, so that no figure about bytes is taken from them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data import Splits
from stages.inputs.datasets import ImageDataset

CLASSES, SIDE = 100, 32
TRAIN, TEST = 10_000, 1_000
_COARSE = 4
"""Prototypes are noise of so many pixels a side, enlarged."""
_NOISE = 60.0
"""Standard deviation, in grey levels: a teacher has some rows wrong."""


@dataclass(frozen=True)
class Images:
    """A map-style dataset. images: uint8 (N, 3, 32, 32). targets: int64 (N,)."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


def images(split: str) -> Images:
    """The split of this name: always the same bytes."""
    size, stream = (TRAIN, 1) if split == "train" else (TEST, 2)
    generator = np.random.default_rng((0, stream))
    labels = generator.permutation(np.arange(size) % CLASSES)
    noise = generator.normal(0, _NOISE, (size, 3, SIDE, SIDE)).astype(np.float32)
    pixels = (_prototypes()[labels] + noise).clip(0, 255).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def noise_splits(samples: int, side: int, classes: int) -> Splits:
    """Colour images of noise, held in memory: so many to train on, an eighth of them to test."""

    def split(name: Literal["train", "test"], size: int) -> ImageDataset:
        generator = torch.Generator().manual_seed(size)
        pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
        labels = torch.arange(size) % classes
        names = tuple(f"class {i}" for i in range(classes))
        digest = f"noise-{size}-{side}"
        return ImageDataset("synthetic", name, names, labels, pixels.__getitem__, pixels, digest)

    return Splits(split("train", samples), split("test", max(4, samples // 8)))


def _prototypes() -> NDArray[np.float32]:
    """float32 (class, 3, 32, 32), the same for both splits."""
    coarse = np.random.default_rng((0, 0)).uniform(40, 215, (CLASSES, 3, _COARSE, _COARSE))
    enlarged = np.kron(coarse, np.ones((SIDE // _COARSE, SIDE // _COARSE)))
    return enlarged.astype(np.float32)
