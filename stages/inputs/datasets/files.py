"""Datasets of image files: folders with one folder a class, and ImageNet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import SAMPLED_MODES, Mode, common_mode, decode
from stages.inputs.datasets.dataset import (
    Feeding,
    ImageDataset,
    Split,
    digest,
    fixed_sample,
    in_memory,
)
from stages.inputs.datasets.manifest import FolderListing, remembered


@dataclass(frozen=True)
class _ImageFiles:
    """Decodes the i-th of some image files; travels to workers as it is."""

    root: Path
    paths: tuple[str, ...]
    mode: Mode

    def __call__(self, index: int) -> Tensor:
        path = self.root / self.paths[index]
        return decode(path, str(path), self.mode)


def folder(root: Path, split: Split, feeding: Feeding, rescan: bool = False) -> ImageDataset:
    names = ("train",) if split == "train" else ("test", "val")
    base = next((root / n for n in names if (root / n).is_dir()), None)
    if base is None:
        raise DatasetError(
            f"no folder {' or '.join(str(root / n) for n in names)}",
            "folder:DIR needs DIR/train/<class>/<image> and DIR/test or DIR/val.",
        )
    listing = remembered("folder", base, lambda: _list_folder(base), rescan)
    return _from_files("folder", split, base, listing, feeding)


def _list_folder(base: Path) -> FolderListing:
    class_names = sorted(e.name for e in os.scandir(base) if e.is_dir() and e.name[0] != ".")
    extensions = _extensions()
    files = [
        (label, f"{name}/{entry.name}", entry.stat().st_size)
        for label, name in enumerate(class_names)
        for entry in sorted(os.scandir(base / name), key=lambda e: e.name)
        if Path(entry.name).suffix.lower() in extensions and entry.name[0] != "."
    ]
    empty = sorted(set(range(len(class_names))) - {label for label, _, _ in files})
    if empty:
        raise DatasetError(
            f"{base / class_names[empty[0]]} holds no images",
            f"Remove the folder or fill it ({len(empty)} of {len(class_names)} classes are empty).",
        )
    return _listing(class_names, files)


def imagenet(
    split: Split, root: str | None, feeding: Feeding, rescan: bool = False
) -> ImageDataset:
    folder = Path(root or "data/downloads/imagenet").expanduser()
    base = folder / ("train" if split == "train" else "val")  # as torchvision has it
    listing = remembered("imagenet", base, lambda: _list_imagenet(folder, base), rescan)
    return _from_files("imagenet", split, base, listing, feeding)


def _list_imagenet(folder: Path, base: Path) -> FolderListing:
    import torchvision.datasets as tvd

    try:
        source = tvd.ImageNet(folder, split=base.name)
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
    files = [
        (label, os.path.relpath(path, base), os.path.getsize(path))
        for path, label in source.samples
    ]
    return _listing(source.wnids, files)


def _listing(class_names: Sequence[str], files: list[tuple[int, str, int]]) -> FolderListing:
    labels, paths, sizes = zip(*files, strict=True) if files else ((), (), ())
    return FolderListing(list(class_names), list(labels), list(paths), list(sizes))


def _from_files(
    name: str, split: Split, base: Path, listing: FolderListing, feeding: Feeding
) -> ImageDataset:
    paths = tuple(listing.paths)
    lines = (f"{p}\t{size}\n".encode() for p, size in zip(paths, listing.sizes, strict=True))
    sampled = (base / paths[index] for index in fixed_sample(len(paths))[:SAMPLED_MODES])
    load = _ImageFiles(base, paths, common_mode((path, str(path)) for path in sampled))
    return ImageDataset(
        name,
        split,
        tuple(listing.class_names),
        torch.tensor(listing.labels, dtype=torch.int64),
        load,
        in_memory(load, len(paths), feeding),
        digest(lines),
    )


def _extensions() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)
