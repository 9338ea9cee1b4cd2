"""Random erasing: a box of zeros somewhere in some images."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from stages.errors import ViewError
from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.views.distributions import GRID, log_uniform
from stages.inputs.views.layers import Layer, on_top
from stages.inputs.views.policy import Drawn, Stream


@dataclass(frozen=True)
class Patches(Drawn):
    """One box a sample in pixels of the rendered image, empty where there is none: int64 (B,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def inside(self, height: int, width: int) -> Tensor:
        """Which pixels of an image of height x width lie in the box: bool (B, 1, height, width)."""
        rows, columns = (torch.arange(side, device=self.top.device) for side in (height, width))
        down = _between(rows, self.top, self.height)  # (B, height)
        across = _between(columns, self.left, self.width)  # (B, width)
        return (down[:, :, None] & across[:, None, :])[:, None]


def _between(positions: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])


@on_top("erasing")
@dataclass(frozen=True)
class Erasing(Layer):
    """Zhong et al. 2020, arXiv 1708.04896, filled with zeros, as torchvision's `RandomErasing`.

    p: share of the images in which a box is erased, of 2 % to 33 % of the area, its ratio (height
    to width) log-uniform in [0.3, 3.3]. Ten tries for a box smaller than the image either way.
    """

    p: float = 0.25
    place: ClassVar[int] = 3
    moves_pixels_only: ClassVar[bool] = True
    tries: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ViewError(f"p must be in [0, 1], was {self.p}")

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> Patches:
        # Drawn on the CPU, as in ResizedCropFlip: correctly rounded float64 arithmetic.
        device = samples.device
        samples, views, height, width = (
            t.to("cpu").unsqueeze(1) for t in (samples, views, height, width)
        )
        tries = torch.arange(self.tries)

        def hashed(purpose: int) -> Tensor:  # (B, tries)
            return counter_hash(seed, Stream.ERASING, views, samples, tries * 4 + purpose)

        share = 0.02 + 0.31 * (bounded(hashed(0), GRID).double() / GRID)
        ratios = log_uniform(0.3, 3.3)
        ratio = ratios[bounded(hashed(1), len(ratios))]
        area = (height * width).double() * share
        box_height = (area * ratio).sqrt().round().long()  # (B, tries)
        box_width = (area / ratio).sqrt().round().long()
        top = bounded(hashed(2), (height - box_height).clamp(min=0) + 1)
        left = bounded(hashed(3), (width - box_width).clamp(min=0) + 1)

        fits = (box_height < height) & (box_width < width)
        first = fits.long().argmax(1, keepdim=True)  # (B, 1)
        chance = counter_hash(seed, Stream.ERASING, views, samples, self.tries * 4)  # (B, 1)
        erased = fits.any(1, keepdim=True) & (bounded(chance, GRID) < round(self.p * GRID))
        box = (t.gather(1, first) * erased for t in (top, left, box_height, box_width))
        return Patches(*(t.squeeze(1).to(device) for t in box))

    def on_image(self, image: Tensor, drawn: Any, i: int) -> Tensor:
        top, left, height, width = (
            int(t[i]) for t in (drawn.top, drawn.left, drawn.height, drawn.width)
        )
        return tv.erase(image, top, left, height, width, torch.zeros(1, dtype=torch.uint8))

    def on_batch(self, images: Tensor, drawn: Any) -> Tensor:
        return images.masked_fill(drawn.inside(*images.shape[-2:]), 0)
