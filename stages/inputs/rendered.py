"""Views rendered image by image, in DataLoader workers: what they show, and what their errors mean.

A batch is one request to a worker, by (sample, view), so that a mixed view's partners are loaded
with it. Several views of a batch are several requests, each all views of some of its samples: an
image is decoded once for a request.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stages.errors import DatasetError, PipelineError
from stages.inputs.datasets import ImageDataset
from stages.inputs.views import Shown, ViewPolicy
from stages.inputs.views.policy import Load

_FEW_FILES = re.compile(r"[Tt]oo many open files|ancdata")
_SHARED_MEMORY = re.compile(r"shared memory|Bus error|/torch_\d|No space left on device")
_KILLED = re.compile(r"DataLoader worker .*(?:killed by signal: ([\w ]+)|exited unexpectedly)")


@dataclass(frozen=True)
class RenderedViews(Dataset[Shown]):
    """Views as workers render them, one by one; indexed by (sample, view)."""

    dataset: ImageDataset
    policy: ViewPolicy
    image_size: int | None

    def shown(self, pairs: Sequence[tuple[int, int]]) -> Shown:
        """View v of sample i for every pair (i, v); the images may differ in size."""
        samples, views = torch.tensor(pairs).T
        size = None if self.image_size is None else (self.image_size,) * 2
        return self.policy.show(self._load_once(), len(self.dataset), samples, views, size)

    def _load_once(self) -> Load:
        """Loads images, each of them once. No view writes into the image that it is made of."""
        held, loaded = self.dataset.images, dict[int, Tensor]()

        def load(samples: Tensor) -> list[Tensor]:
            if held is not None:  # decoded already
                return list(held[samples])
            for sample in samples.tolist():
                if sample not in loaded:
                    loaded[sample] = self.dataset.load(sample)
            return [loaded[sample] for sample in samples.tolist()]

        return load

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Shown | PipelineError:
        # An error is returned and not raised: DataLoader would wrap it in a worker's traceback.
        try:
            shown = self.shown(pairs)
        except PipelineError as error:
            return error
        images = list(shown.images)
        if any(image.shape != images[0].shape for image in images):
            return DatasetError(
                f"images differ in size: {tuple(images[0].shape)} and others",
                "Give --image-size, and --augment resized-crop-flip or none.",
            )
        return shown._replace(images=stacked(images))

    def __getitem__(self, pair: tuple[int, int]) -> Shown:
        return self.shown([pair])


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images of one size (C, H, W) as one tensor (B, C, H, W), whose memory has channels last: as
    decoders and resamplers leave them, and models take them.
    """
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


@dataclass
class BatchPlan:
    """The requests of the next pass; set before each one, read by the loader in this process.

    pieces: int64 (n,) each, samples that are shown in every one of the views, view after view.
    """

    pieces: Sequence[Tensor] = ()
    views: Sequence[int] = (0,)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (
            [(sample, view) for view in self.views for sample in piece.tolist()]
            for piece in self.pieces
        )

    def __len__(self) -> int:
        return len(self.pieces)


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
