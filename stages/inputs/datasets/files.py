"""Datasets of image files: folders with one folder a class, and ImageNet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import (
    SAMPLED_MODES,
    WHOLE,
    Decoding,
    Mode,
    check_command,
    common_mode,
)
from stages.inputs.datasets.dataset import (
    ImageDataset,
    PassedOver,
    Source,
    dataset,
    digest,
    fixed_sample,
    in_memory,
)
from stages.inputs.datasets.encoded import Encoded
from stages.inputs.datasets.listing import (
    has_split,
    holds_images_alone,
    list_folder,
    list_images,
    named_folder,
    not_taken,
    split_folder,
    walk_folder,
    walk_images,
)
from stages.inputs.datasets.manifest import FolderListing, remembered
from stages.inputs.datasets.skipping import blackened, skipped_files


@dataclass(frozen=True)
class _ImageFiles(Encoded):
    """Decodes the i-th of some image files; travels to workers as it is."""

    root: Path
    paths: tuple[str, ...]
    mode: Mode
    command: str
    decoding: Decoding = WHOLE

    def taking(self, samples: Sequence[int]) -> "_ImageFiles":
        """The same for some of the files."""
        return replace(self, paths=tuple(self.paths[sample] for sample in samples))

    def compressed(self, index: int) -> tuple[Path, str]:
        """The file, and what to call it."""
        path = self.root / self.paths[index]
        return path, str(path)


def _passed_over(source: Source) -> list[PassedOver]:
    base = _base(source)
    found = sorted((walk_images if _alone(source, base) else walk_folder)(base)[1])
    folder = named_folder(base.name, source.split)
    return [PassedOver(f"{folder}/{path}", kind) for path, kind in found]


@dataset("folder:", passed_over=_passed_over, tested_elsewhere=True)
def folder(source: Source) -> ImageDataset:
    """DIR/train/CLASS/IMAGE and DIR/test, or DIR/val; DIR/CLASS/IMAGE, or images alone, where
    `test` says what is tested on. Raises DatasetError.
    """
    base, root = _base(source), Path(source.argument).expanduser()
    if _alone(source, base):
        kind, scan = "folder of images", list_images
    else:
        kind, scan = "folder", list_folder
    listing = remembered(kind, base, lambda: scan(base), source.rescan)
    return _from_files("folder", source, base, listing, check_command(f"folder:{root}"))


def _base(source: Source) -> Path:
    """The folder of a split."""
    root = Path(source.argument).expanduser()
    if source.test is None:
        return split_folder(root, source.split)
    if source.split == "test":
        return Path(source.test).expanduser()
    return split_folder(root, "train") if has_split(root, "train") else root


def _alone(source: Source, base: Path) -> bool:
    """Whether the images of a split's folder have no classes."""
    return source.split == "train" and (source.no_labels or holds_images_alone(base))


@dataset("imagenet", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
def imagenet(source: Source) -> ImageDataset:
    """torchvision's ImageNet in the folder `root`. Raises DatasetError."""
    folder = Path(source.root or "data/downloads/imagenet").expanduser()
    base = folder / ("train" if source.split == "train" else "val")  # as torchvision has it
    listing = remembered("imagenet", base, lambda: _list_imagenet(folder, base), source.rescan)
    return _from_files("imagenet", source, base, listing, check_command("imagenet", source.root))


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
    name: str, source: Source, base: Path, listing: FolderListing, command: str
) -> ImageDataset:
    """command: what `pipeline check-data` has to be given for this dataset."""
    notes = not_taken(base, listing.passed_over, f"pipeline check-data {command}")
    listing, found = skipped_files(listing, source.skips, str(base))
    paths, left_out = tuple(listing.paths), {skip.sample for skip in found}
    lines = (
        f"{path}\t{size}\n".encode(errors="surrogateescape")
        for path, size in zip(paths, listing.sizes, strict=True)
    )
    sampled = [i for i in fixed_sample(len(paths))[:SAMPLED_MODES] if i not in left_out]
    mode = common_mode(((path := base / paths[i]), str(path)) for i in sampled)
    files = _ImageFiles(base, paths, mode, command, source.decoding)
    load = blackened(files, found, len(paths))
    return ImageDataset(
        name,
        source.split,
        tuple(listing.class_names),
        torch.tensor(listing.labels, dtype=torch.int64),
        load,
        in_memory(load, len(paths), source.feeding),
        digest(lines),
        notes,
        tuple(found),
        source.exif,
        labelled=bool(listing.class_names),
        jpeg_side=source.jpeg_side,
        decoder=source.decoder,
    )
