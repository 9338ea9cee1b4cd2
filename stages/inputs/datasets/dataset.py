"""What a dataset is: labels, a way to load each image, and digests that say which it is."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.counter_hash import permute
from stages.inputs.datasets.compressed import Decoding
from stages.settings import Decoder, Feeding

Split = Literal["train", "test"]

MEMORY_PIXELS = 128 * 128
"""Larger images are streamed: at that size decoding no longer dominates and memory does."""
MEMORY_BYTES = 4 * 2**30
SAMPLED_IMAGES = 2048
"""How many images channel statistics and the digest of an arbitrary dataset are taken from."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, on the scale of 0 to 1."""


class Skip(msgspec.Struct, frozen=True, order=True):
    """One sample that is left out. Given by a path, or by a number; known by both.

    path: of its file, relative to the split's folder; None where there are no files. bytes: the
    file's size, which the dataset's digest is taken from if the file is deleted or replaced.
    """

    split: Split
    sample: int | None = None
    path: str | None = None
    bytes: int | None = None

    @property
    def name(self) -> str:
        """As a line of a list has it."""
        return f"{self.split}:{self.sample}" if self.path is None else f"{self.split}/{self.path}"


@dataclass(frozen=True)
class ImageDataset:
    """One split of a dataset.

    labels: int64 (N,). load: index -> uint8 (C, H, W). images: uint8 (N, C, H, W) where they are
    held in memory, else None. images_digest: hex, of the content or, for folders, of the relative
    paths and file sizes in order. notes: what a user has to be told of it, a line each. skips:
    samples that are neither trained on nor measured; their pixels are black. exif, jpeg_side,
    decoder: as `Decoding` has them. tested_share: what share of the training images is the test
    split, 0 where that is another. Where it is not labelled, labels are all -1. in_order: samples
    that follow one another lie one after another in few files, and are read best so.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    labels: Tensor
    load: Callable[[int], Tensor]
    images: Tensor | None
    images_digest: str
    notes: tuple[str, ...] = ()
    skips: tuple[Skip, ...] = ()
    exif: bool = False
    tested_share: float = 0.0
    labelled: bool = True
    in_order: bool = False
    jpeg_side: int | None = None
    decoder: Decoder | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image."""
        channels, height, width = self.load(0).shape
        return channels, height, width

    def load_each(self, samples: Sequence[int]) -> list[Tensor]:
        """As `load` gives each; on a GPU decoded in one go."""
        return loaded(self.load, samples)

    @property
    def skipped(self) -> Tensor:
        """int64, ascending: the samples that are left out."""
        return samples_of(self.skips, self.split)

    @property
    def shown(self) -> Tensor:
        """int64, ascending: all samples but those that are left out."""
        return without(torch.arange(len(self)), self.skipped)

    @property
    def labels_digest(self) -> str:
        """See `labels_digest`; empty where there are none."""
        return labels_digest(self.labels) if self.labelled else ""

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, on the scale of 0 to 1.

        Published values where the literature has them, else measured on a fixed sample of images.
        """
        if self.name in PUBLISHED_STATISTICS:
            return PUBLISHED_STATISTICS[self.name]
        count, total, squares = 0, torch.tensor(0), torch.tensor(0)
        for index in without(torch.tensor(fixed_sample(len(self))), self.skipped).tolist():
            pixels = self.load(index).flatten(1).long()  # integer sums are exact
            count += pixels.shape[1]
            total, squares = total + pixels.sum(1), squares + (pixels**2).sum(1)
        mean = total.double() / count
        variance = (squares.double() - count * mean**2) / max(1, count - 1)
        std = variance.clamp(min=0).sqrt()
        return _rounded(mean / 255), _rounded((std / 255).clamp(min=1e-3))


@dataclass(frozen=True)
class Source:
    """One split of a dataset by its name, and how it is read.

    spec: as users give it; argument: what follows its colon. root: the folder of datasets that have
    none in their name. download: let torchvision download what is missing. rescan: list folders of
    images again, see `manifest.py`. skips: samples of this split to leave out. test: what is tested
    on, as the setting of this name has it. no_labels: take images wherever they lie. exif,
    jpeg_side, decoder: as `Decoding` has them.
    """

    spec: str
    split: Split
    root: str | None = None
    feeding: Feeding = "auto"
    download: bool = False
    rescan: bool = False
    skips: Sequence[Skip] = ()
    test: str | None = None
    no_labels: bool = False
    exif: bool = False
    jpeg_side: int | None = None
    decoder: Decoder | None = None

    @property
    def decoding(self) -> Decoding:
        """How its compressed images are decoded."""
        return Decoding(self.exif, self.jpeg_side, self.decoder)

    @property
    def argument(self) -> str:
        """What follows the colon of its name."""
        return self.spec.partition(":")[2]


class PassedOver(NamedTuple):
    """A file that is not taken: its path relative to the split's folder, and why."""

    path: str
    kind: str


Read = Callable[[Source], ImageDataset]
SOURCES: dict[str, Read] = {}
"""What reads a dataset, by its name; a name that ends with a colon is followed by a folder."""
PUBLISHED_STATISTICS: dict[str, Statistics] = {}
"""Of datasets for which the literature has them."""


DIGESTED_WHOLE: set[str] = set()
"""Datasets whose `images_digest` is taken of the pixels of all images."""


TESTED_ELSEWHERE: set[str] = set()
"""Datasets for which `Source.test` may say where other images lie."""


WALKED: dict[str, Callable[[Source], list[PassedOver]]] = {}
"""What lists the files that a dataset does not take, by the names that know."""


def dataset(
    name: str,
    statistics: Statistics | None = None,
    whole: bool = False,
    passed_over: Callable[[Source], list[PassedOver]] | None = None,
    tested_elsewhere: bool = False,
) -> Callable[[Read], Read]:
    """Register what reads the datasets of this name. statistics: published ones. whole: its digest
    is taken of the pixels of all images. passed_over: lists the files that are not taken.
    tested_elsewhere: its `test` may name a place.
    """

    def register(read: Read) -> Read:
        SOURCES[name] = read
        DIGESTED_WHOLE.update({name} if whole else ())
        TESTED_ELSEWHERE.update({name} if tested_elsewhere else ())
        if passed_over is not None:
            WALKED[name] = passed_over
        if statistics is not None:
            PUBLISHED_STATISTICS[name] = statistics
        return read

    return register


def samples_of(skips: Iterable[Skip], split: Split = "train") -> Tensor:
    """int64, ascending: the samples of a split that are left out."""
    numbers = {s.sample for s in skips if s.split == split and s.sample is not None}
    return torch.tensor(sorted(numbers), dtype=torch.int64)


def without(samples: Tensor, skipped: Tensor) -> Tensor:
    """`samples` (int64) in their order, but for those in `skipped` (int64)."""
    return samples[~torch.isin(samples, skipped)] if len(skipped) else samples


def unlabelled(size: int) -> Tensor:
    """int64 (N,): the labels of images that have none."""
    return torch.full((size,), -1)


def loaded(load: Callable[[int], Tensor], samples: Sequence[int]) -> list[Tensor]:
    """What `load` gives of each, by its `many` where it has that."""
    many = getattr(load, "many", None)
    return [load(i) for i in samples] if many is None else list(many(samples))


def in_memory(load: Callable[[int], Tensor], size: int, feeding: Feeding) -> Tensor | None:
    """All images decoded, or None where they are to be streamed."""
    if feeding == "stream" or not size:
        return None
    first = load(0)
    small = first.shape[1] * first.shape[2] <= MEMORY_PIXELS
    if feeding == "auto" and not (small and first.numel() * size <= MEMORY_BYTES):
        return None
    images = torch.empty((size, *first.shape), dtype=torch.uint8)

    def decode(indices: range) -> bool:
        for i in indices:
            image = load(i)
            if image.shape != first.shape:
                return False
            images[i] = image
        return True

    parts = [range(start, min(start + 512, size)) for start in range(0, size, 512)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        if all(pool.map(decode, parts)):
            return images
    if feeding == "memory":
        raise DatasetError(
            "the images differ in size and cannot be held in one tensor",
            "Leave the feeding at 'auto' and give --image-size.",
        )
    return None


def fixed_sample(size: int) -> list[int]:
    """Up to SAMPLED_IMAGES indices, spread at random and always the same."""
    return permute(torch.arange(min(size, SAMPLED_IMAGES)), size, 0).tolist() if size else []


def shape_and_bytes(images: Tensor) -> tuple[bytes, bytes]:
    """What `digest` takes of a tensor of images."""
    return str(tuple(images.shape)).encode(), images.contiguous().numpy().tobytes()


def digest(parts: Iterable[bytes]) -> str:
    """The first 32 hex digits of a sha256 of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def labels_digest(labels: Tensor) -> str:
    """Hex, of int64 labels (N,) in dataset order."""
    return digest([labels.to(torch.int32).numpy().tobytes()])


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())
