"""TrivialAugment and RandAugment: an operation on colours or geometry, and how far it goes.

The fourteen operations and the tables of their magnitudes (31 bins) are those of torchvision's
`TrivialAugmentWide` and `RandAugment`; operation, bin and sign are integers from the counter hash.
What an operation does to uint8 pixels is `torchvision.transforms.v2.functional`'s business, nearest
neighbours and zeros outside as torchvision's transforms have them by default.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from stages.errors import ViewError
from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.views.layers import Layer, on_top
from stages.inputs.views.policy import Drawn, Stream

BINS = 31
OPERATIONS = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness",
    "colour", "contrast", "sharpness", "posterize", "solarize", "auto-contrast", "equalize",
)  # fmt: skip
"""In torchvision's order. The order decides what is drawn: changing it is another version."""


@dataclass(frozen=True)
class Reach:
    """How far each operation goes in the last bin.

    shear, colour: hundredths. translate: pixels, or 331sts of the side. rotate: degrees.
    posterize: bits that are lost.
    """

    shear: int
    translate: int
    of_the_side: bool
    rotate: int
    colour: int
    posterize: int


WIDE = Reach(shear=99, translate=32, of_the_side=False, rotate=135, colour=99, posterize=6)
"""Mueller, Hutter 2021, arXiv 2103.10158, as `TrivialAugmentWide` has it."""
RAND = Reach(shear=30, translate=150, of_the_side=True, rotate=30, colour=90, posterize=4)
"""Cubuk et al. 2020, arXiv 1909.13719, as torchvision's `RandAugment` has it."""


def operate(image: Tensor, operation: str, step: int, reach: Reach) -> Tensor:
    """One operation on a uint8 image (C, H, W) of 1 or 3 channels.

    step: the bin, in [-30, 30]; its sign plays no part in posterize and solarize.
    """
    full, (height, width) = BINS - 1, image.shape[-2:]
    factor = 1 + reach.colour * step / (100 * full)
    match operation:
        case "identity":
            return image
        case "shear-x":
            return _affine(image, shear=[_shear(step, reach), 0.0])
        case "shear-y":
            return _affine(image, shear=[0.0, _shear(step, reach)])
        case "translate-x":
            return _affine(image, translate=[_pixels(step, width, reach), 0])
        case "translate-y":
            return _affine(image, translate=[0, _pixels(step, height, reach)])
        case "rotate":
            rotated: Tensor = tv.rotate(image, reach.rotate * step / full)
            return rotated
        case "brightness":
            return tv.adjust_brightness(image, factor)
        case "colour":
            return tv.adjust_saturation(image, factor)
        case "contrast":
            return _adjust_contrast(image, factor)
        case "sharpness":
            return tv.adjust_sharpness(image, factor)
        case "posterize":
            return tv.posterize(image, round(8 - reach.posterize * abs(step) / full))
        case "solarize":
            return tv.solarize(image, 255 * (full - abs(step)) / full)
        case "auto-contrast":
            return tv.autocontrast(image)
        case _:
            return tv.equalize(image)


def _shear(step: int, reach: Reach) -> float:
    """Degrees; rounded, so that no machine's `atan` decides."""
    angle = math.degrees(math.atan(reach.shear * step / (100 * (BINS - 1))))
    return round(angle * 2**20) / 2**20


def _pixels(step: int, side: int, reach: Reach) -> int:
    """Whole pixels, towards zero as torchvision rounds them."""
    scale, over = (side, 331) if reach.of_the_side else (1, 1)
    pixels = reach.translate * scale * abs(step) // ((BINS - 1) * over)
    return pixels if step > 0 else -pixels


def _affine(
    image: Tensor, translate: list[int] | None = None, shear: list[float] | None = None
) -> Tensor:
    # Shears are about the corner, as in torchvision's own transforms.
    center = [0.0, 0.0] if shear else None
    moved: Tensor = tv.affine(
        image, 0.0, list(translate or [0, 0]), 1.0, shear or [0.0, 0.0], center=center
    )
    return moved


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """`tv.adjust_contrast`, but for the mean: an integer sum. The last bit of a sum of floats
    depends on the number of threads as soon as it passes 2^24, which is 257 x 257 pixels of white.
    """
    grey = tv.rgb_to_grayscale(image) if len(image) == 3 else image
    mean = grey.sum(dtype=torch.int64).float() / grey.numel()
    return image.mul(factor).add_(mean, alpha=1 - factor).clamp_(0, 255).to(torch.uint8)


# ---- which operation ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps(Drawn):
    """operations: int64 (B, n), positions in OPERATIONS. steps: int64 (B, n), in [-30, 30]."""

    operations: Tensor
    steps: Tensor


class _Augment(Layer):
    reach: ClassVar[Reach]

    def on_image(self, image: Tensor, drawn: Any, i: int) -> Tensor:
        if len(image) not in (1, 3):
            raise ViewError(f"{self.name} takes images of 1 or 3 channels, these have {len(image)}")
        for operation, step in zip(
            drawn.operations[i].tolist(), drawn.steps[i].tolist(), strict=True
        ):
            image = operate(image, OPERATIONS[operation], step, self.reach)
        return image.contiguous()


@on_top("trivial-augment")
@dataclass(frozen=True)
class TrivialAugment(_Augment):
    """One operation out of fourteen, in one of 31 magnitudes, either way: TrivialAugmentWide.

    Mueller, Hutter 2021. It moves images by up to 32 pixels, whatever their size: not for digits.
    """

    place: ClassVar[int] = 1
    reach: ClassVar[Reach] = WIDE

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Steps:
        operation, magnitude, sign = (
            counter_hash(seed, Stream.TRIVIAL_AUGMENT, views, samples, draw) for draw in range(3)
        )
        steps = bounded(magnitude, BINS) * (1 - 2 * bounded(sign, 2))
        return _Steps(bounded(operation, len(OPERATIONS))[:, None], steps[:, None])


@on_top("rand-augment")
@dataclass(frozen=True)
class RandAugment(_Augment):
    """n operations out of fourteen one after another, all in bin m of 31: Cubuk et al. 2020."""

    n: int = 2
    m: int = 9
    place: ClassVar[int] = 2
    reach: ClassVar[Reach] = RAND

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 16:
            raise ViewError(f"n must be in [1, 16], was {self.n}")
        if not 0 <= self.m < BINS:
            raise ViewError(f"m must be in [0, {BINS - 1}], was {self.m}")

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Steps:
        turns = torch.arange(self.n, device=samples.device)  # (n,)
        operation, sign = (
            counter_hash(
                seed, Stream.RAND_AUGMENT, views[:, None], samples[:, None], 2 * turns + draw
            )
            for draw in range(2)
        )  # (B, n)
        return _Steps(bounded(operation, len(OPERATIONS)), self.m * (1 - 2 * bounded(sign, 2)))
