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
        self._plan, self._passes = _Plan(), 0
        self._images: Tensor | None = None
        if dataset.images is not None and self._crops_in_place(dataset.images):
            self._images = _on_device(dataset.images, device)

    def _crops_in_place(self, images: Tensor) -> bool:
        at_own_size = self.image_size is None or tuple(images.shape[-2:]) == (self.image_size,) * 2
        return self.policy.moves_pixels_only and at_own_size

    def batches(self, order: Tensor, view: int, batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """View `view` of the samples in `order` (int64 (n,)), cut into batches, without the first
        `skip` of them.

        A last batch of one sample joins the one before it: batch norm cannot train on it alone.
        """
        check_view(self.policy, view)
        if not len(order):
            return
        last = (num_batches(len(order), batch_size) - 1) * batch_size
        parts = [*(order[:last].split(batch_size) if last else ()), order[last:]][skip:]
        if not parts:
            return
        if self._images is not None:
            yield from self._from_memory(self._images, parts, view)
        else:
            yield from self._from_workers(parts, view)

    def _from_memory(self, images: Tensor, parts: list[Tensor], view: int) -> Iterator[Batch]:
        order = torch.cat(parts).to(images.device)
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
        self._passes += 1
        this_pass = self._passes
        for part, pixels in zip(parts, self._loader, strict=True):
            if isinstance(pixels, PipelineError):
                try:
                    raise pixels
                finally:
                    del pixels  # a cycle through this frame would keep the workers alive
            yield Batch(part.to(self.device), pixels.to(self.device, non_blocking=True))
            if this_pass != self._passes:
                raise RuntimeError("another pass over this feed began; its workers serve one")


def num_batches(samples: int, batch_size: int) -> int:
    """How many batches `ViewFeed.batches` cuts so many samples into."""
    joined = samples > batch_size and samples % batch_size == 1
    return -(-samples // batch_size) - joined


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
    pairs = list(zip(samples.tolist(), views.tolist(), strict=True))
    return [zlib.crc32(image.numpy().tobytes()) for image in rendered.images(pairs)]


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
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, self._channels, -1, -1)
        values = torch.empty(pixels.shape, device=pixels.device, memory_format=self._format)
        return values.copy_(pixels).mul_(self._scale).add_(self._shift)


# ---- details --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RenderedViews(Dataset[Tensor]):
    """One view of one sample at a time, as workers render it; indexed by (sample, view)."""

    dataset: ImageDataset
    policy: ViewPolicy
    image_size: int | None

    def images(self, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        """View v of sample i for every pair (i, v): uint8 (C, H, W) each."""
        sources = [self.dataset.load(sample) for sample, _ in pairs]
        samples, views = torch.tensor(pairs).T
        height, width = torch.tensor([source.shape[-2:] for source in sources]).T
        boxes = self.policy.draw(samples, views, height, width)
        sizes = [
            s.shape[-2:] if self.image_size is None else (self.image_size,) * 2 for s in sources
        ]
        return [
            render(source, boxes, i, size)
            for i, (source, size) in enumerate(zip(sources, sizes, strict=True))
        ]

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Tensor | PipelineError:
        # An error is returned and not raised: DataLoader would wrap it in a worker's traceback.
        try:
            images = self.images(pairs)
        except PipelineError as error:
            return error
        if any(image.shape != images[0].shape for image in images):
            return DatasetError(
                f"images differ in size: {tuple(images[0].shape)} and others",
                "Give --image-size, and --augment resized-crop-flip or none.",
            )
        return torch.stack(images)

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        return self.images([pair])[0]


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
