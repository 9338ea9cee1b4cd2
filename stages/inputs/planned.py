"""Batches of views that lie in one place: each is made where the one before was, and the host tells
nothing but that it wants the next. So making one can be recorded as a CUDA graph.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.views import Paired, ViewPolicy


class PlannedBatches:
    """Whole batches of the views of an epoch, of images in memory on the device.

    batch: the one at hand, whose tensors stay as long as epochs have as many samples.
    """

    def __init__(self, images: Tensor, policy: ViewPolicy, num_samples: int, size: int) -> None:
        """images: uint8 (N, C, H, W). size: of a batch."""
        self._images, self._policy, self._num_samples = images, policy, num_samples
        self._plan: Any = None
        self.batch: Batch | None = None
        self._places = torch.arange(size, device=images.device)  # of the next batch, in the order

    def start(self, order: Tensor, view: int, first: int) -> None:
        """Draw all that the view of an epoch needs. order: int64 (n,).
        first: where in it the next batch begins.
        """
        images = self._images
        order = order.to(images.device)
        plan = self._policy.plan(order, view, self._num_samples, images.shape[-2:])
        begins = self._plan is None or len(self._plan.samples) != len(plan.samples)
        if begins:
            self._plan = plan
        else:
            for kept, drawn in zip(_tensors(self._plan), _tensors(plan), strict=True):
                kept.copy_(drawn)
        torch.arange(first, first + len(self._places), out=self._places).remainder_(len(order))
        if begins:
            self.batch = self._shown(self._places)

    def next(self) -> None:
        """Make `batch` the next one. Asks nothing of the host."""
        made = self._shown(self._places)
        for kept, new in zip(_tensors(self.batch), _tensors(made), strict=True):
            kept.copy_(new)
        self._places.add_(len(self._places)).remainder_(len(self._plan.samples))

    def last(self, first: int) -> Batch:
        """What is left of the epoch from a place in its order on, in memory of its own."""
        return self._shown(slice(first, None))

    def changed(self) -> Mapping[Hashable, Tensor]:
        """What `next` changes."""
        return dict(enumerate([*_tensors(self.batch), self._places]))

    def _shown(self, which: Tensor | slice) -> Batch:
        plan = self._plan[which]
        shown = self._policy.show_planned(self._images, plan)
        assert isinstance(shown.images, Tensor)
        return Batch(plan.samples, shown.images, shown.partners, shown.shares)


def planned_batches(feed: ViewFeed, size: int) -> PlannedBatches | str:
    """Those of a feed, or why they cannot be made, as a sentence without its end."""
    images, policy = feed.images, feed.policy
    if images is None or images.device.type != feed.device.type:
        return "images are streamed, or do not fit on the device"
    if not policy.batched or isinstance(policy, Paired):
        return f"views of '{policy.name}' are not all cut out in the same way"
    return PlannedBatches(images, policy, len(feed.dataset), size)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of dataclasses and tuples, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [] if value is None else [tensor for part in value for tensor in _tensors(part)]
