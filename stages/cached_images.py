"""The images of a cache: by name or as a dataset object, checked, and rendered as views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stages.cache import LogitCache
from stages.data import check_identity, skips_of
from stages.errors import IdentityError
from stages.inputs.datasets import ImageDataset
from stages.inputs.datasets.own import own_images
from stages.inputs.feed import Batch, ViewFeed
from stages.inputs.probes import probes_differ
from stages.inputs.views import ViewPolicy
from stages.inputs.views.policy import Plan
from stages.settings import DataSettings
from stages.user_code import check_trusted

Transform = Callable[[Tensor], Tensor]
"""uint8 pixels (B, C, H, W) -> what a student takes, B first."""
MOST_VIEWS = 2
"""Views that one batch may mix; each is read whole. A weak and a strong view are two."""


def named_images(cache: LogitCache, name: str | None) -> DataSettings:
    """The dataset of this name, or the one that the cache names if its code is trusted."""
    if name is None:
        name = cache.identity.dataset.name
        check_trusted(f"cache {cache.path}", name=name)
    known = cache.identity.dataset
    share = f"{known.tested_share:.17g}" if known.tested_share else None
    return DataSettings(
        dataset=name,
        test=share if cache.tested else "none",
        no_labels=not cache.labelled,
        exif=known.exif,
        jpeg_side=known.jpeg_side,
        decoder=known.decoder,
    )


def given_images(
    cache: LogitCache, images: "Dataset[Any] | Sequence[Any]", policy: ViewPolicy
) -> ImageDataset:
    """A dataset object, checked against the cache as far as its pixels and labels allow."""
    known = cache.identity.dataset
    skips = [skip for skip in skips_of([cache.skips]) if skip.split == "train"]
    found = own_images(images, known.name, known.class_names, cache.labels, known.images, skips)
    found = replace(found, exif=known.exif, jpeg_side=known.jpeg_side, decoder=known.decoder)
    found = replace(found, tested_share=known.tested_share or 0.0)
    if known.tested_share:  # the digest is of all of them
        found = replace(found, images_digest=known.images)
    check_identity(cache, found)
    size, expected = cache.identity.teacher.image_size, cache.pixel_probes
    if drift := probes_differ(found, policy, size, expected):
        raise IdentityError(
            f"{drift} of {cache.path} differ: the images are not what the teacher saw",
            "Give raw images in the cache's order: no augmentation, no resizing, uint8.",
        )
    return found


@dataclass
class Pixels:
    """The views of images, read in whatever process asks for them.

    The draws of a whole view are made when it is first asked for, as they cost more by the batch.
    """

    images: ImageDataset
    policy: ViewPolicy
    image_size: int | None
    feed: ViewFeed | None = None
    plans: dict[int, Plan] = field(default_factory=dict)

    def read(self, view: int, samples: Tensor) -> Batch:
        """samples: int64 (B,). On the CPU."""
        held, (policy, own_view) = self.images.images, self.policy.at(view)
        size = self.image_size
        if held is not None and policy.batched and (not size or {*held.shape[-2:]} == {size}):
            if view not in self.plans:
                if len(self.plans) == MOST_VIEWS:
                    del self.plans[next(iter(self.plans))]
                every = torch.arange(len(held))
                self.plans[view] = policy.plan(every, own_view, len(held), held.shape[-2:])
            shown = policy.show_planned(held, self.plans[view][samples])
            assert isinstance(shown.images, Tensor)
            return Batch(samples, shown.images, shown.partners, shown.shares)
        if self.feed is None:
            cpu = torch.device("cpu")
            self.feed = ViewFeed(self.images, self.policy, cpu, self.image_size, workers=0)
        (batch,) = self.feed.batches(samples, view, len(samples))
        return replace(batch, pixels=batch.pixels.contiguous())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "feed": None, "plans": {}}


class CleanImages(Dataset[tuple[Tensor, Tensor]]):
    """The clean test split: items are an image, float32 (C, H, W), and its label, int64 ()."""

    def __init__(
        self, images: ImageDataset, clean: ViewPolicy, size: int | None, transform: Transform
    ) -> None:
        self.transform, self.samples = transform, images.shown
        self._pixels = Pixels(images, clean, size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of a batch, rendered together. Raises IndexError outside of the split."""
        samples = self.samples[torch.as_tensor(indices, dtype=torch.int64)]
        shown = self.transform(self._pixels.read(0, samples).pixels)
        return list(zip(shown.unbind(), self._pixels.images.labels[samples].unbind(), strict=True))
