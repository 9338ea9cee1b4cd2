"""Datasets of image files: folders with one folder a class, and ImageNet."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.dataset import (
    Feeding,
    ImageDataset,
    Split,
    digest,
    fixed_sample,
    in_memory,
)

SAMPLED_MODES = 64
"""How many image files decide whether a dataset is grey; one in colour among grey is an error."""


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


def folder(root: Path, split: Split, feeding: Feeding) -> ImageDataset:
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


def imagenet(split: Split, root: str | None, feeding: Feeding) -> ImageDataset:
    import torchvision.datasets as tvd

    folder = root or "data/downloads/imagenet"
    try:
        source = tvd.ImageNet(folder, split="train" if split == "train" else "val")
    except ModuleNotFoundError as error:  # torchvision reads the development kit with scipy
        raise DatasetError(
            f"ImageNet is missing or incomplete in {folder}: no meta.bin, and no {error.name} to "
            "make it from the development kit",
            "Point --root at the folder that holds its archives, and pip install scipy.",
        ) from error
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
    for index in fixed_sample(len(paths))[:SAMPLED_MODES]:
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
        in_memory(load, len(paths), feeding),
        digest(f"{path}\t{size}\n".encode() for _, path, size in listing),
    )


def _extensions() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)
