"""Which files of a folder are its images: one folder a class, whatever lies below it.

As torchvision's ImageFolder lists them, in its order and through symbolic links, but for hidden
files and folders. What is not taken is counted by its kind, so that nothing is left out in silence.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from stages.errors import DatasetError, refusals
from stages.inputs.datasets.dataset import PassedOver, Split
from stages.inputs.datasets.manifest import DANGLING, FolderListing

LAYOUTS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (("train", "training"),),
    "test": (("test", "testing"), ("val", "valid", "validation")),
}
"""What a split's folder may be called, in any case. An earlier group is preferred."""
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and cannot decode by itself: for EPS it would run another program."""
_NEEDED = (
    "folder:DIR needs DIR/train/CLASS/IMAGE and DIR/test (or DIR/val) of the same classes. "
    "DIR/CLASS/IMAGE and images alone need --test none, --test 0.1 or --test DIR."
)


@cache
def extensions() -> frozenset[str]:
    """Of the files that Pillow can decode, in lower case, with their dot."""
    from PIL import Image

    known = Image.registered_extensions()  # loads all plugins, which fill Image.OPEN
    return frozenset(e for e, f in known.items() if f in Image.OPEN and f not in _NO_PIXELS)


def split_of_folder(name: str) -> Split | None:
    """The split that a folder of this name may be."""
    splits = (s for s, groups in LAYOUTS.items() if any(name.lower() in g for g in groups))
    return next(splits, None)


def named_folder(name: str, split: Split) -> str:
    """What a skip list calls the folder of a split: by its name, where that says which it is."""
    return name if split_of_folder(name) == split else split


def split_folder(root: Path, split: Split) -> Path:
    """The folder of a split. Raises DatasetError if there is none, or more than one."""
    found = _subfolders(root)
    for group in LAYOUTS[split]:
        names = [name for name in found if name.lower() in group]
        if len(names) > 1:
            raise DatasetError(
                f"{root} has the folders {' and '.join(names)}: either may be the {split} split",
                "Rename or move all but one of them.",
            )
        if names:
            _check_labelled(root, root / names[0], split)
            return root / names[0]
    wanted = " or ".join(group[0] for group in LAYOUTS[split])
    inner = [n for n in found if {"train", "training"} & {x.lower() for x in _subfolders(root / n)}]
    near = f"Give folder:{root / inner[0]}, which has a training split. " if inner else ""
    raise DatasetError(f"no folder {wanted} in {root}", near + _NEEDED)


def has_split(root: Path, split: Split) -> bool:
    """Whether a folder has one for this split."""
    return any(split_of_folder(name) == split for name in _subfolders(root))


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if _is_folder(e) and e.name[0] != ".")
    except FileNotFoundError as error:
        raise DatasetError(f"no folder {folder}", _NEEDED) from error
    except OSError as error:
        raise DatasetError(f"cannot list {folder}: {error.strerror}", _NEEDED) from error


def _check_labelled(root: Path, base: Path, split: Split) -> None:
    """Raise DatasetError for two known layouts whose test images do not lie in class folders."""
    if split == "train" or [name.lower() for name in _subfolders(base)] not in ([], ["images"]):
        return
    for val in (root / n for n in _subfolders(root) if n.lower() in LAYOUTS["test"][1]):
        if (val / "val_annotations.txt").is_file() and (val / "images").is_dir():
            raise DatasetError(
                f"{val} has Tiny-ImageNet's layout: labels in val_annotations.txt, no class "
                f"folders. Move {root}/test away (it has no labels), then in {val} run",
                "while read f c _; do mkdir -p $c; mv images/$f $c/; done < val_annotations.txt; "
                "rmdir images",
            )
    if base.name.lower() not in LAYOUTS["test"][0]:
        return
    raise DatasetError(
        f"the images of {base} do not lie in class folders, so they have no labels",
        f"Sort them into {base}/CLASS/IMAGE; or move {base} away and put labelled images in "
        f"{root}/val/CLASS/IMAGE.",
    )


def list_folder(base: Path) -> FolderListing:
    """The images of a split's folder. Raises DatasetError for a class without any."""
    return walk_folder(base)[0]


def holds_images_alone(base: Path) -> bool:
    """Whether images lie right in a folder, and no folders beside them."""
    if _subfolders(base):
        return False
    return any(_kind(entry) is None for entry in _entries(str(base)))


def list_images(base: Path) -> FolderListing:
    """The images of a folder, at any depth, whose folders are no classes. Raises DatasetError if
    there are none.
    """
    return walk_images(base)[0]


def walk_images(base: Path) -> tuple[FolderListing, list[PassedOver]]:
    """As `list_images`, and what was not taken."""
    found = _Found(str(base))
    found.descend("")
    if not found.files:
        there = counted(Counter(kind for _, kind in found.passed)) or "nothing"
        raise DatasetError(f"{base} has no images, only: {there}", "Give a folder of images.")
    listing = FolderListing(
        [],
        [-1] * len(found.files),
        [f"{folder}/{name}".lstrip("/") for folder, name, _ in found.files],
        [size for _, _, size in found.files],
        found.folders,
        dict(Counter(kind for _, kind in found.passed)),
    )
    return listing, found.passed


def walk_folder(base: Path) -> tuple[FolderListing, list[PassedOver]]:
    """As `list_folder`, and what was not taken."""
    found = _Found(str(base))
    class_names = found.classes()
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(class_names):
        _check_text(base, name)
        before, passed = len(found.files), len(found.passed)
        found.descend(name)
        labels += [label] * (len(found.files) - before)
        if len(found.files) == before:
            there = counted(Counter(kind for _, kind in found.passed[passed:]))
            empty.append(str(base / name) + (f" (not taken: {there})" if there else ""))
    if empty or not class_names:
        _refuse_empty(base, class_names, empty, found)
    listing = FolderListing(
        class_names,
        labels,
        [f"{folder}/{name}" for folder, name, _ in found.files],
        [size for _, _, size in found.files],
        found.folders,
        dict(Counter(kind for _, kind in found.passed)),
    )
    return listing, found.passed


def not_taken(base: Path, passed_over: dict[str, int], command: str) -> tuple[str, ...]:
    """What to say of a folder: one line about what was passed over, if anything was."""
    if not passed_over:
        return ()
    return (f"{base}: not taken: {counted(passed_over)}. `{command}` lists them.",)


# ---- details --------------------------------------------------------------------------------


@dataclass
class _Found:
    """What lies below a folder. files: (folder, name, bytes), in ImageFolder's order."""

    base: str
    files: list[tuple[str, str, int]] = field(default_factory=list)
    folders: list[str] = field(default_factory=lambda: [""])
    passed: list[PassedOver] = field(default_factory=list)

    def classes(self) -> list[str]:
        """The folders directly below, sorted; what lies beside them is passed over."""
        names = []
        for entry in _entries(self.base):
            if _is_folder(entry):
                names.append(entry.name)
            elif (kind := _kind(entry)) is not None:
                self.passed.append(PassedOver(entry.name, kind))
            else:
                self.passed.append(PassedOver(entry.name, "outside class folders"))
        return sorted(names)

    def descend(self, name: str) -> None:
        """Take what lies in a class's folder and below it."""
        files: list[tuple[str, str, int]] = []
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(name, frozenset())]
        while waiting:
            folder, above = waiting.pop()
            self.folders.append(folder)
            here = os.stat(os.path.join(self.base, folder))
            above |= {(here.st_dev, here.st_ino)}
            for entry in _entries(os.path.join(self.base, folder)):
                path = f"{folder}/{entry.name}".lstrip("/")
                if not _is_folder(entry):
                    if (kind := _kind(entry)) is None:
                        files.append((folder, entry.name, entry.stat().st_size))
                    else:
                        self.passed.append(PassedOver(path, kind))
                    continue
                inner = entry.stat()
                if (inner.st_dev, inner.st_ino) in above:
                    self.passed.append(PassedOver(path, "link to a folder above it"))
                else:
                    waiting.append((path, above))
        self.files += sorted(files)


def _entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    """What lies in a folder and is not hidden. Raises DatasetError if it cannot be listed."""
    remedy = "Allow reading it, or move it away."
    with refusals(DatasetError, f"cannot list {folder}", remedy), os.scandir(folder) as entries:
        yield from (entry for entry in entries if entry.name[0] != ".")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind(entry: "os.DirEntry[str]") -> str | None:
    """Why a file is not taken; None if it is."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return DANGLING if entry.is_symlink() else str(error.strerror)
    if not stat.S_ISREG(mode):
        return "special file"
    suffix = os.path.splitext(entry.name)[1].lower()
    return None if suffix in extensions() else suffix or "without extension"


def counted(kinds: dict[str, int]) -> str:
    """2,040 .txt, 3 .npy: the most frequent kinds first."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in most[:6]]
    rest = sum(count for _, count in most[6:])
    return ", ".join(shown + ([f"{rest:,} others"] if rest else []))


def _check_text(base: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"the name of the class folder {name!r} in {base} is not UTF-8", "Rename it."
        ) from error


def _refuse_empty(base: Path, class_names: list[str], empty: list[str], found: _Found) -> None:
    if not class_names:
        there = counted(Counter(kind for _, kind in found.passed)) or "nothing"
        raise DatasetError(f"{base} has no class folders, only: {there}", _NEEDED)
    raise DatasetError(
        f"{empty[0]} holds no images",
        f"Put images there or move the folder away ({len(empty)} of {len(class_names)} classes "
        "are empty).",
    )
