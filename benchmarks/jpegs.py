"""Large JPEGs, made from numbers, and a model that takes next to no time for them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

HEIGHT, WIDTH, CLASSES = 375, 500, 4


class Strided(nn.Module):
    """One linear layer on 8 x 8 pixels of a view: as little model as there can be."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        step = images.shape[-1] // 8
        logits: Tensor = self.layer(images[..., ::step, ::step].flatten(1))
        return logits


def jpeg(i: int, quality: int = 90, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Image i: noise of four scales, the finer the weaker."""
    random = np.random.default_rng(i)
    pixels = np.full((height, width, 3), 128.0)
    for cell, strength in ((125, 50), (32, 30), (8, 20), (2, 24)):
        coarse = random.normal(0, strength, (height // cell + 2, width // cell + 2, 3))
        scaled = tv.resize(torch.from_numpy(coarse).permute(2, 0, 1), [height, width])
        pixels += scaled.permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=quality)
    return content.getvalue()


def generate(folder: Path, images: int, quality: int = 90) -> float:
    """`images` for training and a few for testing, in class folders. Returns the mean bytes of a
    training file.
    """
    sizes = []
    for split, count in (("train", images), ("val", 2 * CLASSES)):
        for i in range(count):
            path = folder / split / f"class{i % CLASSES}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sizes.append(path.write_bytes(jpeg(i, quality)))
    return float(np.mean(sizes[:images]))
