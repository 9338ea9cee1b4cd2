"""Boxes of images: cut out, mirrored, resized. Which box a view shows is drawn in `crops.py`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.views.policy import Drawn

Box = tuple[int, int, int, int, int]
"""Top, left, height, width, and whether it is mirrored: of one of `Boxes`."""


@dataclass(frozen=True)
class Boxes(Drawn):
    """One crop a sample, in pixels of its source image; every field int64 (B,).

    top, left: the box's corner, negative or beyond the image where it reaches into the padding.
    height, width: its size. mirrored: 0 or 1, whether the crop is flipped left to right.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    mirrored: Tensor

    def each(self) -> list[Box]:
        """The crop of every sample."""
        fields = (self.top, self.left, self.height, self.width, self.mirrored)
        return list(zip(*(field.tolist() for field in fields), strict=True))


FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def cut_out(
    image: Tensor,
    box: Box,
    size: Sequence[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Tensor:
    """Cut a box out of an image, mirror it, resize it to `size` if it differs: uint8 (C, *size).

    image: uint8 (C, H, W); zeros outside of it. Resampling is torchvision's, antialiased, on the
    CPU, for teacher and student alike; where it resized, channels are last in memory, as decoders
    lay them out.
    """
    top, left, height, width, mirrored = box
    crop = tv.crop(image, top, left, height, width)
    if resized := (height, width) != tuple(size):
        # Dense, as decoders lay colours out: the same pixels from torch's resampler, sooner.
        crop = crop[None].contiguous(memory_format=torch.channels_last)[0]
    if mirrored:
        crop = crop.flip(-1)
    return resample(crop, size, interpolation) if resized else crop.contiguous()


def resample(crop: Tensor, size: Sequence[int], interpolation: InterpolationMode) -> Tensor:
    """A dense crop (C, H, W), channels last in memory, as torchvision resizes it: through torch's
    own function where that gives the same pixels, as torchvision takes twice as long to call it.
    """
    if not _resamples_as_torchvision(interpolation):
        return tv.resize(crop, list(size), interpolation=interpolation, antialias=True)
    channels, height, width = crop.shape
    strides = (channels * height * width, *crop.stride())  # says that channels are last
    batch = crop.as_strided((1, channels, height, width), strides)
    return _interpolated(batch, size, interpolation)[0]


@functools.cache
def _resamples_as_torchvision(interpolation: InterpolationMode) -> bool:
    """Whether torchvision hands uint8 pixels to torch as they are. On some processors it takes the
    way over float32, and other pixels come out.
    """
    image = bounded(counter_hash(0, torch.arange(3 * 64 * 61)), 256).byte().view(1, 3, 64, 61)
    return all(
        torch.equal(
            tv.resize(image, list(size), interpolation=interpolation, antialias=True),
            _interpolated(image, size, interpolation),
        )
        for size in ((37, 41), (80, 90))
    )


def _interpolated(batch: Tensor, size: Sequence[int], interpolation: InterpolationMode) -> Tensor:
    return torch.nn.functional.interpolate(
        batch, tuple(size), mode=interpolation.value, align_corners=False, antialias=True
    )
