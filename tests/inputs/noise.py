"""Images of noise, and datasets of them."""

import torch
from torch import Tensor

from stages.inputs.datasets import ImageDataset


def noise(*shape: int, seed: int = 0) -> Tensor:
    """uint8 pixels, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def noise_dataset(size: int = 21, side: int = 12, streamed: bool = False) -> ImageDataset:
    """Colour images of two classes, in one tensor or loaded one by one."""
    images, labels = noise(size, 3, side, side), torch.arange(size) % 2
    held = None if streamed else images
    return ImageDataset("noise", "train", ("a", "b"), labels, images.__getitem__, held, "")
