"""Crops: boxes drawn in integer pixels of the source image.

A policy draws where a crop starts, how large it is and whether it is mirrored. Rendering a box to
the input size of a teacher or a student is another step (`boxes.py`), so that both can look at the
same crop at different sizes. Where a policy only moves pixels, whole batches are cropped by
indexing, on CPU or GPU, with the same bytes as `cut_out` gives for one image.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.errors import ViewError
from stages.inputs.counter_hash import bounded, counter_hash, permute
from stages.inputs.views.boxes import FILTERS, Boxes, cut_out
from stages.inputs.views.distributions import GRID, log_uniform
from stages.inputs.views.named import ADDED, Named, base
from stages.inputs.views.policy import Images, Size, View, ViewPolicy, views_of


@dataclass(frozen=True)
class CropPolicy(Named, ViewPolicy):
    """A policy that cuts one box out of each image.

    interpolation: the filter, always antialiased, of a box that is brought to another size.
    """

    interpolation: str = field(default="bilinear", kw_only=True, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            raise ViewError(
                f"interpolation must be {' or '.join(FILTERS)}, was '{self.interpolation}'"
            )

    @property
    def moves_pixels_only(self) -> bool:
        return True

    @abstractmethod
    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Boxes:
        """The box of each sample: samples, height, width int64 (B,); view as in `apply`."""

    def render_each(self, images: Images, samples: Tensor, view: View, size: Size) -> list[Tensor]:
        height, width = torch.tensor([image.shape[-2:] for image in images]).T
        boxes = self.draw(samples, view, height, width)
        chosen = FILTERS[self.interpolation]
        return [
            cut_out(x, box, size or x.shape[-2:], chosen)
            for x, box in zip(images, boxes.each(), strict=True)
        ]


@base("pad-crop")
@dataclass(frozen=True)
class PadCrop(CropPolicy):
    """Zero-pad, crop back to size: He et al. 2016, section 4.2, without the mirror.

    With padding p there are (2p+1)^2 distinct views; the default has 81. View v of sample i is the
    p_i(v)-th of them, p_i a permutation of its own, so that `count` views are every view there is.
    """

    pad: int = 4
    seed: int = 0
    mirrors: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pad <= 64:
            raise ViewError(f"pad must be in [0, 64], was {self.pad}")

    @property
    def count(self) -> int:
        return self.mirrors * (2 * self.pad + 1) ** 2

    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Boxes:
        which = permute(
            views_of(view, samples), self.count, self.seed, samples
        )  # (B,) in [0, count)
        side = 2 * self.pad + 1
        mirrored, offset = which // side**2, which % side**2
        return Boxes(offset // side - self.pad, offset % side - self.pad, height, width, mirrored)

    def crop(self, images: Tensor, drawn: Any) -> Tensor:
        """As `cut_out` for every image, by indexing, on any device."""
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, [self.pad] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W)
        every = torch.arange(len(images), device=images.device)
        crops = windows[every, :, drawn.top + self.pad, drawn.left + self.pad]
        return torch.where(drawn.mirrored.view(-1, 1, 1, 1).bool(), crops.flip(-1), crops)


@base("pad-crop-flip")
@dataclass(frozen=True)
class PadCropFlip(PadCrop):
    """Zero-pad, crop back to size, maybe mirror: He et al. 2016, section 4.2.

    With padding p there are 2 (2p+1)^2 distinct views; the default has 162.
    """

    mirrors: ClassVar[int] = 2


@base("resized-crop-flip")
@dataclass(frozen=True)
class ResizedCropFlip(CropPolicy):
    """Random area and aspect ratio, maybe mirrored: Szegedy et al. 2015, as torchvision draws it.

    Up to ten tries for a box that fits, then the largest central crop within the ratios. The
    log-uniform ratio is drawn from 1,024 values rounded to 2^-20, so that no machine's `exp`
    decides about a pixel. Unbounded: every view number gives a new crop.
    """

    min_area: float = 0.08
    seed: int = 0
    tries: ClassVar[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_area <= 1:
            raise ViewError(f"min_area must be in (0, 1], was {self.min_area}")

    @property
    def count(self) -> None:
        return None

    @property
    def moves_pixels_only(self) -> bool:
        return False

    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Boxes:
        # Drawn on the CPU: correctly rounded float64 arithmetic, a handful of numbers a sample.
        device = samples.device
        samples, height, width = (t.to("cpu").unsqueeze(1) for t in (samples, height, width))
        views = torch.as_tensor(view).to("cpu").expand(len(samples)).unsqueeze(1)
        hashed = counter_hash(self.seed, views, samples, torch.arange(self.tries * 4 + 1))
        shares, ratios, tops, lefts = hashed[:, :-1].unflatten(1, (-1, 4)).unbind(2)  # (B, tries)

        share = bounded(shares, GRID).double() / GRID
        area = (height * width).double() * (self.min_area + (1 - self.min_area) * share)
        known = log_uniform(3 / 4, 4 / 3)
        ratio = known[bounded(ratios, len(known))]
        box_width = (area * ratio).sqrt().round().long()  # (B, tries)
        box_height = (area / ratio).sqrt().round().long()
        fits = (box_width >= 1) & (box_height >= 1) & (box_width <= width) & (box_height <= height)
        first = fits.long().argmax(1, keepdim=True)  # (B, 1)
        box_height, box_width = (t.gather(1, first) for t in (box_height, box_width))
        top = bounded(tops.gather(1, first), (height - box_height).clamp(min=0) + 1)
        left = bounded(lefts.gather(1, first), (width - box_width).clamp(min=0) + 1)

        drawn: tuple[Tensor, ...] = (top, left, box_height, box_width)
        if not bool((some := fits.any(1, keepdim=True)).all()):
            central = _central_within_ratios(height, width)
            drawn = tuple(torch.where(some, t, c) for t, c in zip(drawn, central, strict=True))
        mirrored = bounded(hashed[:, -1:], 2)
        return Boxes(*(t.squeeze(1).to(device) for t in (*drawn, mirrored)))


def _central_within_ratios(height: Tensor, width: Tensor) -> tuple[Tensor, ...]:
    """torchvision's fallback: the whole image, cut to the nearest allowed ratio, centred."""
    box_width = torch.minimum(width, (height.double() * (4 / 3)).round().long())
    box_height = torch.minimum(height, (width.double() / (3 / 4)).round().long())
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@base("none")
@dataclass(frozen=True)
class Plain(CropPolicy):
    """One view: the whole image, or, with zoom >= 1, its central square.

    The square's side is the shorter side of the image divided by `zoom`: 256 / 224 is the usual
    "resize to 256, centre-crop 224" of large images.
    """

    zoom: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zoom != 0 and not 1 <= self.zoom < math.inf:
            raise ViewError(f"zoom must be 0 or at least 1, was {self.zoom}")

    @property
    def count(self) -> int:
        return 1

    @property
    def moves_pixels_only(self) -> bool:
        return self.zoom == 0

    def draw(self, samples: Tensor, view: View, height: Tensor, width: Tensor) -> Boxes:
        zero = torch.zeros_like(height)
        if self.zoom == 0:
            return Boxes(zero, zero, height, width, zero)
        side = (torch.minimum(height, width).double() / self.zoom).round().long().clamp(min=1)
        return Boxes((height - side) // 2, (width - side) // 2, side, side, zero)

    def crop(self, images: Tensor, drawn: Any) -> Tensor:
        """The images themselves: what is zoomed is rendered one by one."""
        return images
