"""Pixels of one view of a dataset, batch by batch: one definition of a view, two ways of feeding.

Images held in memory are cropped a whole batch at a time where they lie, on the training device
where they fit. Other images are decoded and rendered by DataLoader workers. Both give the same
bytes; so does any batch size, order or number of workers.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.errors import DatasetError, PipelineError
from stages.inputs.counter_hash import bounded, counter_hash
from stages.inputs.datasets import ImageDataset
from stages.inputs.views import Plain, ViewPolicy, check_view, render

PROBES = 256
PROBED_VIEWS = 1024
"""Probes are drawn from the first 1,024 views of a policy, however many a cache holds."""


def plain_view(image_size: int | None, resize: int | None) -> Plain:
    """The clean view that evaluation uses: the whole image at its own size, or, for images that
    are brought to `image_size`, the centre after the shorter side went to `resize`.
    """
    return Plain(zoom=0.0 if image_size is None else max(resize or 0, image_size) / image_size)


@dataclass(frozen=True)
class Batch:
    """samples: int64 (B,), dataset indices. pixels: uint8 (B, C, H, W). Both on the device."""

    samples: Tensor
    pixels: Tensor


class ViewFeed:
    """The images of a dataset, as a policy shows them, at one input size, on one device."""

    def __init__(
        self,
        dataset: ImageDataset,
        policy: ViewPolicy,
        device: torch.device,
        image_size: int | None = None,
        workers: int = 2,
    ) -> None:
        self.dataset, self.policy, self.device = dataset, policy, device
        self.image_size = image_size
        self._rendered = _RenderedViews(dataset, policy, image_size)
        self._workers = workers
        self._loader: DataLoader[Tensor | PipelineError] | None = None
        self._plan = _Plan()
        self._images: Tensor | None = None
        if dataset.images is not None and self._crops_in_place(dataset.images):
            self._images = _on_device(dataset.images, device)

    def _crops_in_place(self, images: Tensor) -> bool:
        at_own_size = self.image_size is None or tuple(images.shape[-2:]) == (self.image_size,) * 2
        return self.policy.moves_pixels_only and at_own_size

    def batches(self, order: Tensor, view: int, batch_size: int) -> Iterator[Batch]:
        """View `view` of the samples in `order` (int64 (n,)), cut into batches.

        A last batch of one sample joins the one before it: batch norm cannot train on it alone.
        """
        check_view(self.policy, view)
        full = num_batches(len(order), batch_size) - 1
        parts = [*order[: full * batch_size].split(batch_size), order[full * batch_size :]]
        parts = [part for part in parts if len(part)]
        if self._images is not None:
            yield from self._from_memory(self._images, order, parts, view)
        else:
            yield from self._from_workers(parts, view)

    def _from_memory(
        self, images: Tensor, order: Tensor, parts: list[Tensor], view: int
    ) -> Iterator[Batch]:
        order = order.to(images.device)
        size = torch.tensor(images.shape[-2:], device=images.device)
        boxes = self.policy.draw(order, view, *size.unsqueeze(1).expand(2, len(order)))
        start = 0
        for part in parts:
            here = slice(start, start := start + len(part))
            pixels = self.policy.crop(images[order[here]], boxes[here])
            yield Batch(order[here].to(self.device), pixels.to(self.device))

    def _from_workers(self, parts: list[Tensor], view: int) -> Iterator[Batch]:
        self._plan.parts, self._plan.view = parts, view
        if self._loader is None:
            self._loader = DataLoader(
                self._rendered,
                batch_sampler=self._plan,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=self.device.type == "cuda",
            )
        for part, pixels in zip(parts, self._loader, strict=True):
            if isinstance(pixels, PipelineError):
                raise pixels
            yield Batch(part.to(self.device), pixels.to(self.device, non_blocking=True))


def num_batches(samples: int, batch_size: int) -> int:
    """How many batches `ViewFeed.batches` cuts so many samples into."""
    return max(1, -(-samples // batch_size) - (samples % batch_size == 1))


def pixel_probes(
    dataset: ImageDataset, policy: ViewPolicy, image_size: int | None, seed: int = 0
) -> list[int]:
    """crc32 of the uint8 pixels of 256 fixed (view, sample) pairs.

    The pairs depend on the policy and the number of samples, not on how many views are cached.
    """
    rendered = _RenderedViews(dataset, policy, image_size)
    probe = torch.arange(PROBES)
    views = bounded(counter_hash(seed, probe, 0), min(policy.count or PROBED_VIEWS, PROBED_VIEWS))
    samples = bounded(counter_hash(seed, probe, 1), len(dataset))
    pairs = zip(samples.tolist(), views.tolist(), strict=True)
    return [zlib.crc32(rendered.image(sample, view).numpy().tobytes()) for sample, view in pairs]


class Normalise:
    """uint8 pixels (B, C, H, W) -> float32, each channel by mean and standard deviation.

    mean, std: one number a channel, on the scale of 0 to 1. Grey pixels are repeated where the
    model takes three channels. The result is channels-last in memory where that is asked for.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        device: torch.device,
        channels_last: bool = True,
    ) -> None:
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) * 255 * scale
        self._scale, self._shift = (t.float().view(1, -1, 1, 1).to(device) for t in (scale, shift))
        self._channels = channels
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        values = pixels.to(torch.float32, memory_format=self._format)
        values = values.mul_(self._scale).add_(self._shift)
        return values.expand(-1, self._channels, -1, -1) if values.shape[1] == 1 else values


# ---- details --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RenderedViews(Dataset[Tensor]):
    """One view of one sample at a time, as workers render it; indexed by (sample, view)."""

    dataset: ImageDataset
    policy: ViewPolicy
    image_size: int | None

    def image(self, sample: int, view: int) -> Tensor:
        """uint8 (C, H, W)."""
        image = self.dataset.load(sample)
        height, width = image.shape[-2:]
        boxes = self.policy.draw(
            torch.tensor([sample]), view, torch.tensor([height]), torch.tensor([width])
        )
        size = (height, width) if self.image_size is None else (self.image_size,) * 2
        return render(image, boxes, 0, size)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Tensor | PipelineError:
        # An error is returned and not raised: DataLoader would wrap it in a worker's traceback.
        try:
            images = [self.image(sample, view) for sample, view in pairs]
        except PipelineError as error:
            return error
        if any(image.shape != images[0].shape for image in images):
            return DatasetError(
                f"images differ in size: {tuple(images[0].shape)} and others",
                "Give --image-size, and --augment resized-crop-flip or none.",
            )
        return torch.stack(images)

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        return self.image(*pair)


@dataclass
class _Plan:
    """The batches of the next pass; set before each one, read by the loader in this process."""

    parts: Sequence[Tensor] = ()
    view: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(sample, self.view) for sample in part.tolist()] for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def _as_it_is(batch: Any) -> Any:
    return batch  # __getitems__ has made a batch already


def _on_device(images: Tensor, device: torch.device) -> Tensor:
    """The images on the training device, if they take less than half of what is free there."""
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        return images.to(device)
    return images
