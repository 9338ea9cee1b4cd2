"""Images and labels: what a dataset is, whatever it was made from.

Small images of one size are decoded once into a uint8 tensor; anything else is loaded one by one
(`feed.py` does that in workers). A dataset's digests do not depend on which of the two it is.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.counter_hash import permute

Split = Literal["train", "test"]
Feeding = Literal["auto", "memory", "stream"]

MEMORY_PIXELS = 128 * 128
"""Larger images are streamed: at that size decoding no longer dominates and memory does."""
MEMORY_BYTES = 4 * 2**30
SAMPLED_IMAGES = 2048
"""How many images channel statistics and the digest of an arbitrary dataset are taken from."""

SAMPLED_MODES = 64
"""How many image files decide whether a dataset is grey; one in colour among grey is an error."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
PUBLISHED_STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ImageDataset:
    """One split of a dataset.

    labels: int64 (N,). load: index -> uint8 (C, H, W). images: uint8 (N, C, H, W) where they are
    held in memory, else None. images_digest: hex, of the content or, for folders, of the relative
    paths and file sizes in order.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    labels: Tensor
    load: Callable[[int], Tensor]
    images: Tensor | None
    images_digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image."""
        channels, height, width = self.load(0).shape
        return channels, height, width

    @property
    def labels_digest(self) -> str:
        return _digest([self.labels.to(torch.int32).numpy().tobytes()])

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, on the scale of 0 to 1.

        Published values where the literature has them, else measured on a fixed sample of images.
        """
        if self.name in PUBLISHED_STATISTICS:
            return PUBLISHED_STATISTICS[self.name]
        count, total, squares = 0, torch.tensor(0), torch.tensor(0)
        for index in _fixed_sample(len(self)):
            pixels = self.load(index).flatten(1).long()  # integer sums are exact
            count += pixels.shape[1]
            total, squares = total + pixels.sum(1), squares + (pixels**2).sum(1)
        mean = total.double() / count
        std = (squares.double() / count - mean**2).clamp(min=0).sqrt()
        return _rounded(mean / 255), _rounded((std / 255).clamp(min=1e-3))


def load_dataset(
    spec: str,
    split: Split,
    root: str | None = None,
    feeding: Feeding = "auto",
    download: bool = False,
) -> ImageDataset:
    """One split of `digits`, `cifar10`, `cifar100`, `fashion-mnist`, `imagenet`, `folder:DIR` or
    `module:callable`.

    Raises DatasetError if it is missing, unreadable, or has fewer than two classes.
    """
    kind, _, argument = spec.partition(":")
    if kind == "folder":
        dataset = _folder(Path(argument), split, feeding)
    elif spec == "digits":
        dataset = _digits(split)
    elif spec in _TORCHVISION_ARRAYS:
        dataset = _torchvision_arrays(spec, split, root, download)
    elif spec == "imagenet":
        dataset = _imagenet(split, root, feeding)
    elif argument:
        dataset = _callable(spec, split, feeding)
    else:
        raise DatasetError(
            f"unknown dataset '{spec}'",
            "Known: digits, cifar10, cifar100, fashion-mnist, imagenet, folder:DIR, "
            "module:callable.",
        )
    labels = dataset.labels
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.class_names):
        raise DatasetError(
            f"dataset '{spec}' ({split}) has labels from {int(labels.min())} to "
            f"{int(labels.max())} for {len(dataset.class_names)} classes",
            "Labels count from 0; give one class name a label.",
        )
    if len(dataset.class_names) < 2 or not len(dataset):
        raise DatasetError(
            f"dataset '{spec}' ({split}) has {len(dataset)} images in "
            f"{len(dataset.class_names)} class(es)",
            "Distillation needs at least two classes with images.",
        )
    return dataset


def load_splits(
    spec: str, root: str | None = None, feeding: Feeding = "auto", download: bool = False
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test split, which must have the same classes."""
    train = load_dataset(spec, "train", root, feeding, download)
    test = load_dataset(spec, "test", root, feeding, download)
    if train.class_names != test.class_names:
        only = sorted(set(train.class_names) ^ set(test.class_names))
        raise DatasetError(
            f"the classes of {spec}'s training and test split differ: {', '.join(only[:5])}",
            "Both splits need the same classes under the same names.",
        )
    if train.shape[0] != test.shape[0]:
        raise DatasetError(
            f"{spec}'s training images have {train.shape[0]} channel(s), its test images "
            f"{test.shape[0]}",
            "Convert them alike, to grey or to colour.",
        )
    return train, test


# ---- arrays ---------------------------------------------------------------------------------

_TORCHVISION_ARRAYS = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
}


def _from_array(
    name: str, split: Split, class_names: Iterable[str], labels: Any, images: Tensor
) -> ImageDataset:
    digest = _digest(_shape_and_bytes(images))
    return ImageDataset(
        name,
        split,
        tuple(class_names),
        torch.as_tensor(labels, dtype=torch.int64),
        images.__getitem__,
        images,
        digest,
    )


def _digits(split: Split) -> ImageDataset:
    here = Path(__file__).parent
    paths = [here / "digits.npz", here.parents[1] / "data" / "digits.npz"]  # installed, checkout
    try:
        path = next(p for p in paths if p.is_file())
    except StopIteration:
        raise DatasetError(
            f"the embedded digits are missing from {paths[-1].parent}", "Reinstall the package."
        ) from None
    with np.load(path, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1)
        return _from_array("digits", split, "0123456789", arrays[f"{split}_labels"], images)


def _torchvision_arrays(name: str, split: Split, root: str | None, download: bool) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = root or "data/downloads"
    try:
        source = getattr(tvd, _TORCHVISION_ARRAYS[name])(
            folder, train=split == "train", download=download
        )
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"{name} is missing or corrupt in {folder}: {str(error).splitlines()[0]}",
            "Point --root at it, or add --download.",
        ) from error
    data = torch.as_tensor(source.data)
    images = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
    return _from_array(name, split, source.classes, source.targets, images)


# ---- files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageFiles:
    """Decodes the i-th of some image files; travels to workers as it is."""

    root: Path
    paths: tuple[str, ...]
    mode: str

    def __call__(self, index: int) -> Tensor:
        path = self.root / self.paths[index]
        with _opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DatasetError(
                    f"image {path} has more than 8 bits a channel", "Convert the images to 8 bits."
                )
            if self.mode == "L" and image.mode not in _GREY:
                raise DatasetError(
                    f"image {path} is in colour, others of the dataset are grey",
                    "Convert them alike, to grey or to colour.",
                )
            pixels = np.array(image.convert(self.mode))
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


_GREY = ("1", "L", "LA")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file being read. Raises DatasetError, naming it, for whatever Pillow cannot read."""
    try:
        with Image.open(path) as image:
            yield image
    except DatasetError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"cannot read image {path}: {error}", "Replace the file or remove it."
        ) from error


def _folder(root: Path, split: Split, feeding: Feeding) -> ImageDataset:
    names = ("train",) if split == "train" else ("test", "val")
    base = next((root / n for n in names if (root / n).is_dir()), None)
    if base is None:
        raise DatasetError(
            f"no folder {' or '.join(str(root / n) for n in names)}",
            "folder:DIR needs DIR/train/<class>/<image> and DIR/test or DIR/val.",
        )
    class_names = sorted(e.name for e in os.scandir(base) if e.is_dir() and e.name[0] != ".")
    extensions = _extensions()
    listing = [
        (label, f"{name}/{entry.name}", entry.stat().st_size)
        for label, name in enumerate(class_names)
        for entry in sorted(os.scandir(base / name), key=lambda e: e.name)
        if Path(entry.name).suffix.lower() in extensions and entry.name[0] != "."
    ]
    empty = sorted(set(range(len(class_names))) - {label for label, _, _ in listing})
    if empty:
        raise DatasetError(
            f"{base / class_names[empty[0]]} holds no images",
            f"Remove the folder or fill it ({len(empty)} of {len(class_names)} classes are empty).",
        )
    return _from_files("folder", split, class_names, base, listing, feeding)


def _imagenet(split: Split, root: str | None, feeding: Feeding) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = root or "data/downloads/imagenet"
    try:
        source = tvd.ImageNet(folder, split="train" if split == "train" else "val")
    except (RuntimeError, OSError) as error:
        raise DatasetError(
            f"ImageNet is missing or incomplete in {folder}: {str(error).splitlines()[0]}",
            "Point --root at the folder that holds its train and val archives or folders.",
        ) from error
    base = Path(source.split_folder)
    listing = [
        (label, os.path.relpath(path, base), os.path.getsize(path))
        for path, label in source.samples
    ]
    return _from_files("imagenet", split, source.wnids, base, listing, feeding)


def _from_files(
    name: str,
    split: Split,
    class_names: Sequence[str],
    base: Path,
    listing: list[tuple[int, str, int]],
    feeding: Feeding,
) -> ImageDataset:
    labels = [label for label, _, _ in listing]
    paths = tuple(path for _, path, _ in listing)
    modes = set()
    for index in _fixed_sample(len(paths))[:SAMPLED_MODES]:
        with _opened(base / paths[index]) as image:
            modes.add(image.mode)
    mode = "L" if modes and modes.issubset(_GREY) else "RGB"
    load = _ImageFiles(base, paths, mode)
    return ImageDataset(
        name,
        split,
        tuple(class_names),
        torch.tensor(labels, dtype=torch.int64),
        load,
        _in_memory(load, len(paths), feeding),
        _digest(f"{path}\t{size}\n".encode() for _, path, size in listing),
    )


def _extensions() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)


# ---- anything else --------------------------------------------------------------------------


@dataclass(frozen=True)
class _MapStyle:
    """Loads from a map-style dataset of (image, label): PIL image, array (H, W[, C]) or tensor."""

    source: Any

    def __call__(self, index: int) -> Tensor:
        image = self.source[index][0]
        if not isinstance(image, Tensor):
            pixels = np.array(image)
            image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
            image = image.permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise DatasetError(
                f"image {index} is {image.dtype} of shape {tuple(image.shape)}",
                "Return PIL images or uint8 pixels: (C, H, W) tensors or (H, W, C) arrays.",
            )
        return image


def _callable(spec: str, split: Split, feeding: Feeding) -> ImageDataset:
    module, _, attribute = spec.partition(":")
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DatasetError(
            f"cannot import dataset '{spec}': {error}",
            "module:callable must be importable from the current directory.",
        ) from error
    source = build(split)
    size = len(source)
    labels = getattr(source, "targets", None)
    if labels is None:
        labels = [int(source[i][1]) for i in range(size)]
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) != size:
        raise DatasetError(
            f"dataset '{spec}' ({split}) has {size} images and {len(labels)} labels",
            "Its `targets` need one label an image.",
        )
    class_names = getattr(source, "classes", None)
    if class_names is None:
        class_names = [str(c) for c in range(int(labels.max()) + 1 if size else 0)]
    load = _MapStyle(source)
    return ImageDataset(
        spec,
        split,
        tuple(map(str, class_names)),
        labels,
        load,
        _in_memory(load, size, feeding),
        _digest(part for i in _fixed_sample(size) for part in _shape_and_bytes(load(i))),
    )


# ---- shared ---------------------------------------------------------------------------------


def _in_memory(load: Callable[[int], Tensor], size: int, feeding: Feeding) -> Tensor | None:
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


def _fixed_sample(size: int) -> list[int]:
    """Up to SAMPLED_IMAGES indices, spread at random and always the same."""
    return permute(torch.arange(size), size, 0)[:SAMPLED_IMAGES].tolist() if size else []


def _shape_and_bytes(images: Tensor) -> tuple[bytes, bytes]:
    return str(tuple(images.shape)).encode(), images.contiguous().numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())
