"""Pixels of one view of a dataset, batch by batch: one definition of a view, two ways of feeding.

Images held in memory are cropped, erased and mixed a whole batch at a time where they lie, on the
training device where they fit. Other images, and views that are resampled or recoloured, are
rendered by DataLoader workers. Both give the same bytes; so does any batch size, order or number of
workers, as a sample's partner in a mixed view does not depend on its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.inputs.datasets import ImageDataset
from stages.inputs.rendered import RenderedViews
from stages.inputs.views import Plain, Shown, ViewPolicy, check_view
from stages.inputs.workers import Workers

_CACHED_VALUES = 2**18
"""float32 numbers that are normalised at a time: they stay in a core's cache meanwhile."""


def plain_view(image_size: int | None, resize: int | None) -> Plain:
    """The clean view that evaluation uses: the whole image at its own size, or, for images that
    are brought to `image_size`, the centre after the shorter side went to `resize`.
    """
    return Plain(zoom=0.0 if image_size is None else max(resize or 0, image_size) / image_size)


@dataclass(frozen=True)
class Batch:
    """samples: int64 (B,), dataset indices. pixels: uint8 (B, C, H, W). All on the device.

    Where views mix two samples (mixup, cutmix), partners: int64 (B,), the other sample, and shares:
    float32 (B,), how much of the pixels is the sample's own, at least 1/2; else None. views: where
    an epoch shows several, those of this batch, one after another; () where it shows one.
    """

    samples: Tensor
    pixels: Tensor
    partners: Tensor | None = None
    shares: Tensor | None = None
    views: tuple[int, ...] = ()

    def hard_labels(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `stages.objectives.losses.mixed_ce` takes: own labels (B,), partners' and shares.

        labels: int64 (N,), of the whole dataset.
        """
        partners = None if self.partners is None else labels[self.partners]
        return labels[self.samples], partners, self.shares


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, one after another.

    Where some are mixed and others not, an unmixed sample is its own partner with a share of 1.
    """
    if len(batches) == 1:
        return batches[0]
    samples = torch.cat([batch.samples for batch in batches])
    pixels = torch.cat([batch.pixels for batch in batches])
    if all(batch.partners is None for batch in batches):
        return Batch(samples, pixels)
    partners = [b.samples if b.partners is None else b.partners for b in batches]
    shares = [
        torch.ones(len(b.samples), device=b.samples.device) if b.shares is None else b.shares
        for b in batches
    ]
    return Batch(samples, pixels, torch.cat(partners), torch.cat(shares))


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
        rendered = RenderedViews(dataset, policy, image_size)
        self._workers = Workers(rendered, workers, device)
        self._images: Tensor | None = None
        if dataset.images is not None and policy.batched and self._at_own_size(dataset.images):
            self._images = _on_device(dataset.images, device)

    @property
    def images(self) -> Tensor | None:
        """uint8 (N, C, H, W), those that whole batches are cut out of; None where each is rendered
        for itself.
        """
        return self._images

    def _at_own_size(self, images: Tensor) -> bool:
        return self.image_size is None or tuple(images.shape[-2:]) == (self.image_size,) * 2

    def batches(self, order: Tensor, view: int, batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """View `view` of the samples in `order` (int64 (n,)), cut into batches, without the first
        `skip` of them.

        A last batch of one sample joins the one before it: batch norm cannot train on it alone.
        """
        for (batch,) in self.views(order, (view,), batch_size, skip):
            yield batch

    def views(
        self, order: Tensor, views: Sequence[int], batch_size: int, skip: int = 0
    ) -> Iterator[tuple[Batch, ...]]:
        """As `batches`, of several different views: the samples of a batch in each of them. What
        workers decode is decoded once for all views.
        """
        parts = cut(order, batch_size)[skip:] if len(order) else []
        return self.views_of(parts, views)

    def views_of(
        self, parts: Sequence[Tensor], views: Sequence[int]
    ) -> Iterator[tuple[Batch, ...]]:
        """As `views`, of batches that are cut already: dataset indices, int64 (b,) each."""
        for view in views:
            check_view(self.policy, view)
        if not parts:
            return
        policies = {view: self.policy.at(view) for view in views}
        held = {v: at for v, at in policies.items() if self._images is not None and at[0].batched}
        shown = {view: self._from_memory(*at, parts) for view, at in held.items()}
        others = [view for view in views if view not in held]
        if not others:
            yield from zip(*(shown[view] for view in views), strict=True)
            return
        for batches in self._from_workers(parts, others):
            found = dict(zip(others, batches, strict=True))
            yield tuple(found[v] if v in found else next(shown[v]) for v in views)

    def _from_memory(
        self, policy: ViewPolicy, view: int, parts: Sequence[Tensor]
    ) -> Iterator[Batch]:
        images = self._images
        assert images is not None
        order = torch.cat([*parts]).to(images.device)
        plan = policy.plan(order, view, len(self.dataset), images.shape[-2:])
        start = 0
        for part in parts:
            here = slice(start, start := start + len(part))
            yield self._batch(order[here], policy.show_planned(images, plan[here]))

    def _from_workers(self, parts: Sequence[Tensor], views: Sequence[int]) -> Iterator[list[Batch]]:
        for part, shown in zip(parts, self._workers.shown(parts, views), strict=True):
            yield [self._batch(part, of_view) for of_view in shown]

    def close(self) -> None:
        """Let the workers go; the next pass starts others."""
        self._workers.close()

    def _batch(self, samples: Tensor, shown: Shown) -> Batch:
        assert isinstance(shown.images, Tensor)
        partners, shares = (
            None if t is None else send(t, self.device) for t in (shown.partners, shown.shares)
        )
        pixels = send(shown.images, self.device)
        return Batch(send(samples, self.device), pixels, partners, shares)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From this machine's memory to a GPU without waiting: what is queued
    there afterwards finds it. The tensor may be dropped at once, and changed unless it is pinned.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # pinned memory is kept until then
    return tensor.to(device)


def cut(order: Tensor, batch_size: int) -> list[Tensor]:
    """Samples (int64 (n,), one at the least) in batches, as `num_batches` counts them."""
    last = (num_batches(len(order), batch_size) - 1) * batch_size
    return [*(order[:last].split(batch_size) if last else ()), order[last:]]


def num_batches(samples: int, batch_size: int) -> int:
    """How many batches `ViewFeed.batches` cuts so many samples into."""
    joined = samples > batch_size and samples % batch_size == 1
    return -(-samples // batch_size) - joined


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
        if pixels.device.type != "cpu":
            return values.copy_(pixels).mul_(self._scale).add_(self._shift)
        scale, shift, rows = self._scale, self._shift, values
        size, channels, height, width = values.shape
        if self._format == torch.channels_last and channels > 1:
            # A row of pixels is one long row of numbers: loops over three channels are slow.
            scale, shift = (t.flatten().expand(channels).repeat(width) for t in (scale, shift))
            rows = values.permute(0, 2, 3, 1).view(size, height, width * channels)
        some = max(1, _CACHED_VALUES // max(1, values[:1].numel()))
        parts = (t.split(some) for t in (values, pixels, rows))
        for part, own, of_rows in zip(*parts, strict=True):
            part.copy_(own)
            of_rows.mul_(scale).add_(shift)
        return values


def _on_device(images: Tensor, device: torch.device) -> Tensor:
    """The images on the training device, if they take less than half of what is free there."""
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        return images.to(device)
    return images
