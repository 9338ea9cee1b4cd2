"""Mixup and cutmix: how two images become one, and how much of it is the first's.

The share l of an image is drawn from Beta(alpha, alpha) and folded to max(l, 1 - l), in whole
256ths: the own label is always the dominant one. Beta(alpha, alpha) is symmetric, so that folding
leaves the mixtures of unordered pairs as they were for mixup. For cutmix the smaller share is
always the box and never the frame around it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.views.distributions import MIXED
from stages.inputs.views.erasing import Patches
from stages.inputs.views.layers import on_top
from stages.inputs.views.mixing import Mixer
from stages.inputs.views.policy import Drawn, Stream


@dataclass(frozen=True)
class _Keeps(Drawn):
    keep: Tensor
    """int64 (B,): 256ths of the own image."""


@on_top("mixup")
@dataclass(frozen=True)
class Mixup(Mixer):
    """l a + (1 - l) b: Zhang et al. 2018, arXiv 1710.09412."""

    alpha: float = 0.8

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Keeps:
        return _Keeps(self._keep(seed, Stream.MIXUP, samples, views))

    def mix(self, images: Tensor, others: Tensor, drawn: Any) -> Tensor:
        keep: Tensor = drawn.keep.int().view(-1, 1, 1, 1)
        return ((keep * images + (MIXED - keep) * others + MIXED // 2) >> 8).to(torch.uint8)

    def shares(self, drawn: Any) -> Tensor:
        keep: Tensor = drawn.keep
        return keep.float() / MIXED


@dataclass(frozen=True)
class _Cuts(Drawn):
    box: Patches
    height: Tensor
    width: Tensor


@on_top("cutmix")
@dataclass(frozen=True)
class Cutmix(Mixer):
    """A box of the partner in the image: Yun et al. 2019, arXiv 1905.04899.

    The box has sides sqrt(1 - l) of the image's, a centre anywhere, and is cut off at the edges;
    the share is counted in pixels of what is left of it.
    """

    alpha: float = 1.0
    moves_pixels_only: ClassVar[bool] = True

    def draw(
        self, seed: int, samples: Tensor, views: Tensor, height: Tensor, width: Tensor
    ) -> _Cuts:
        keep = self._keep(seed, Stream.CUTMIX, samples, views)
        # Rounded down, so that the box never covers more than 1 - l <= 1/2. The square root of a
        # multiple of 2^-8 in float64 is correctly rounded, the same on every machine.
        side = ((MIXED - keep).double() / MIXED).sqrt()
        edges = []
        for draw, length in ((1, height), (2, width)):
            cut = (length * side).long()
            centre = bounded(counter_hash(seed, Stream.CUTMIX, views, samples, draw), length)
            start = (centre - cut // 2).clamp(min=0)
            stop = torch.minimum(centre - cut // 2 + cut, length)
            edges.append((start, stop - start))
        (top, box_height), (left, box_width) = edges
        return _Cuts(Patches(top, left, box_height, box_width), height, width)

    def mix(self, images: Tensor, others: Tensor, drawn: Any) -> Tensor:
        return torch.where(drawn.box.inside(*images.shape[-2:]), others, images)

    def shares(self, drawn: Any) -> Tensor:
        whole = drawn.height * drawn.width
        own: Tensor = (whole - drawn.box.height * drawn.box.width).double() / whole
        return own.float()
