"""Views rendered image by image, in DataLoader workers: what they show, and what their errors mean.

A batch is one request to a worker, so that a mixed view's partners are loaded with it. Several
views of a batch are one request or more, each all views of some of its samples: an image is decoded
once for a request. How requests reach workers is said in `workers.py`.
"""

import errno
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stages.errors import DatasetError, PipelineError
from stages.inputs.buffers import Slots
from stages.inputs.datasets import ImageDataset
from stages.inputs.views import Shown, ViewPolicy
from stages.inputs.views.policy import Load

_FEW_FILES = re.compile(r"[Tt]oo many open files|ancdata")
_SHARED_MEMORY = re.compile(r"shared memory|Bus error|/torch_\d|No space left on device")
_KILLED = re.compile(r"DataLoader worker .*(?:killed by signal: ([\w ]+)|exited unexpectedly)")


class Request(NamedTuple):
    """Views of some samples: all samples in the first view, then in the next. slot: where the
    pixels go, None for memory of their own.
    """

    samples: list[int]
    views: list[int]
    slot: int | None = None


class Answer(NamedTuple):
    """What a request gives. shape: (B, H, W, C), of its images, one after another. pixels: uint8 of
    that shape; None where they lie in the slot. partners, shares: as `Shown` has them.
    """

    slot: int | None
    shape: tuple[int, ...]
    pixels: Tensor | None
    partners: Tensor | None
    shares: Tensor | None


@dataclass
class RenderedViews(Dataset[Answer | PipelineError]):
    """Views as workers render them, one by one. slots: where requests may want pixels to go."""

    dataset: ImageDataset
    policy: ViewPolicy
    image_size: int | None
    slots: Slots | None = None

    def shown(self, samples: Tensor, views: Tensor) -> Shown:
        """View `views[i]` of `samples[i]`; the images may differ in size."""
        size = None if self.image_size is None else (self.image_size,) * 2
        return self.policy.show(self._load_once(), len(self.dataset), samples, views, size)

    def _load_once(self) -> Load:
        """Loads images, each of them once. No view writes into the image that it is made of."""
        held, loaded = self.dataset.images, dict[int, Tensor]()

        def load(samples: Tensor) -> list[Tensor]:
            if held is not None:  # decoded already
                return list(held[samples])
            numbers = samples.tolist()
            if missing := [i for i in dict.fromkeys(numbers) if i not in loaded]:
                loaded.update(zip(missing, self.dataset.load_each(missing), strict=True))
            return [loaded[sample] for sample in numbers]

        return load

    def __getitems__(self, request: Request) -> Answer | PipelineError:
        # An error is returned and not raised: DataLoader would wrap it in a worker's traceback.
        samples, views = torch.tensor(request.samples), torch.tensor(request.views)
        try:
            shown = self.shown(samples.repeat(len(views)), views.repeat_interleave(len(samples)))
        except PipelineError as error:
            return error
        images = [image.permute(1, 2, 0) for image in shown.images]
        if any(image.shape != images[0].shape for image in images):
            return sizes_differ(*images)
        shape, into = (len(images), *images[0].shape), None
        if request.slot is not None and self.slots and math.prod(shape) <= self.slots.size:
            into = self.slots.at(request.slot, shape)
        pixels = torch.stack(images, out=into)
        left = None if into is not None else pixels
        return Answer(request.slot, shape, left, shown.partners, shown.shares)

    def __getitem__(self, request: Request) -> Answer | PipelineError:
        return self.__getitems__(request)


def sizes_differ(*images: Tensor) -> DatasetError:
    """images: (H, W, C) each."""
    height, width, channels = images[0].shape
    return DatasetError(
        f"images differ in size: {(channels, height, width)} and others",
        "Give --image-size, and --augment resized-crop-flip or none.",
    )


def worker_error(error: BaseException, workers: int) -> DatasetError:
    """Why decoding stopped, when it is not for an image, and what to do."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or _FEW_FILES.search(text):
        return DatasetError(
            "too many files are open to decode images",
            f"Raise the limit with `ulimit -n 4096`, or use fewer --workers than {workers}.",
        )
    if _SHARED_MEMORY.search(text):
        return DatasetError(
            "there is too little shared memory for the workers that decode images (/dev/shm)",
            "Use --workers 0, or give the container more: docker run --shm-size=8g.",
        )
    if match := _KILLED.search(text):
        return DatasetError(
            f"a worker that decodes images was ended by the system ({match[1] or 'it exited'})",
            f"Perhaps memory was short: use fewer --workers than {workers}, or --workers 0.",
        )
    lines = text.strip().splitlines() or [type(error).__name__]
    return DatasetError(
        f"a worker that decodes images failed: {lines[-1]}",
        "Use --workers 0 to see where.",
    )


def as_it_is(batch: Any) -> Any:
    """What a `DataLoader` need not collate: `__getitems__` has made a batch already."""
    return batch
