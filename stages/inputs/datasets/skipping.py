"""Samples that are left out of training and evaluation, such as broken images.

They keep their numbers, so that a list can be added to a cache that has begun without it. Their
pixels are black. Training and measuring use the other samples only.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from stages.errors import DatasetError, refusals
from stages.inputs.datasets.dataset import Skip, loaded
from stages.inputs.datasets.listing import split_of_folder
from stages.inputs.datasets.manifest import FolderListing
from stages.inputs.datasets.parts import taking

_NUMBER = re.compile(r"(?:(train|test):)?(\d{1,18})", re.ASCII)
_FORM = "A line is train/CLASS/FILE as `pipeline check-data` writes it, or train:NUMBER."


def read_skip_list(file: str | Path) -> list[Skip]:
    """The samples that a file names, one a line: `train/cat/3.jpg`, or `train:17`, or `17`.

    After a tab may follow the file's size in bytes, and after another tab anything. Empty lines and
    those that begin with `#` say nothing. Raises DatasetError.
    """
    path = Path(file).expanduser()
    remedy = "Make one with `pipeline check-data DATASET --skip-out FILE`."
    with refusals(DatasetError, f"cannot read the skip list {path}", remedy):
        lines = path.read_text(errors="surrogateescape").split("\n")
    return [
        _parsed(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith("#")
    ]


def _parsed(line: str, where: str) -> Skip:
    name, *more = (part.strip() for part in line.split("\t"))
    size = int(more[0]) if more and more[0].isdecimal() else None
    if match := _NUMBER.fullmatch(name):
        return Skip("test" if match[1] == "test" else "train", int(match[2]))
    folder, slash, path = name.removeprefix("./").partition("/")
    split = split_of_folder(folder)
    if not slash or split is None:
        raise DatasetError(f"{where}: '{name}' names no image of a split", _FORM)
    return Skip(split, None, path, size)


def skipped_files(
    listing: FolderListing, skips: Sequence[Skip], where: str
) -> tuple[FolderListing, list[Skip]]:
    """A folder's listing as it was before files of the list were deleted or replaced, and the list
    with its samples' numbers. Raises DatasetError for a file that never was there.
    """
    if not skips:
        return listing, []
    wanted = {skip.path: skip for skip in reversed(skips) if skip.path is not None}
    known = dict(zip(listing.paths, listing.sizes, strict=True))
    label_of = {name: label for label, name in enumerate(listing.class_names)}
    rows = list(zip(listing.labels, listing.paths, strict=True))
    for path, skip in wanted.items():
        label = label_of.get(path.partition("/")[0]) if label_of else -1
        if path not in known and (label is None or skip.bytes is None):
            raise DatasetError(
                f"the skip list names {skip.name}, which is not among the images of {where}",
                "Correct the line, or remove it. A deleted file needs its size, after a tab.",
            )
        if path not in known and label is not None:
            rows.append((label, path))
        known[path] = known[path] if skip.bytes is None else skip.bytes
    if len(rows) > len(listing.paths):  # the order that they were listed in
        rows.sort(key=lambda row: (row[0], os.path.dirname(row[1]), os.path.basename(row[1])))
    numbers = {skip.sample for skip in skips if skip.path is None}
    _check_numbers(numbers, len(rows), where)
    labels, paths = (list(column) for column in zip(*rows, strict=True))
    listing = msgspec.structs.replace(
        listing, labels=labels, paths=paths, sizes=[known[path] for path in paths]
    )
    left_out = [i for i, path in enumerate(paths) if path in wanted or i in numbers]
    return listing, [Skip(skips[0].split, i, paths[i], listing.sizes[i]) for i in left_out]


def skipped_numbers(skips: Sequence[Skip], size: int, where: str) -> list[Skip]:
    """The list of a dataset that has no files of its own. Raises DatasetError."""
    for skip in skips:
        if skip.path is not None:
            raise DatasetError(
                f"the skip list names a file, {skip.name}; {where} is no folder of files",
                f"Name its samples: {skip.split}:NUMBER.",
            )
    numbers = {skip.sample for skip in skips}
    _check_numbers(numbers, size, where)
    return sorted(Skip(skips[0].split, number) for number in numbers) if skips else []


def _check_numbers(numbers: Iterable[int | None], size: int, where: str) -> None:
    beyond = [n for n in numbers if n is not None and n >= size]
    if beyond:
        raise DatasetError(
            f"the skip list names sample {min(beyond)} of {where}, which has {size:,}",
            "Samples count from 0.",
        )


@dataclass(frozen=True)
class Blackened:
    """Loads black pixels, of the first other image's shape, for skipped samples."""

    load: Callable[[int], Tensor]
    skipped: frozenset[int]
    shape: tuple[int, ...]

    def __call__(self, index: int) -> Tensor:
        if index in self.skipped:
            return torch.zeros(self.shape, dtype=torch.uint8)
        return self.load(index)

    def many(self, indices: Sequence[int]) -> list[Tensor]:
        """As each by itself."""
        shown = [index for index in indices if index not in self.skipped]
        images = iter(loaded(self.load, shown) if shown else [])
        black = torch.zeros(self.shape, dtype=torch.uint8)
        return [black if index in self.skipped else next(images) for index in indices]

    def taking(self, samples: Sequence[int]) -> "Blackened":
        """The same for the i-th of these samples."""
        skipped = frozenset(i for i, sample in enumerate(samples) if sample in self.skipped)
        return Blackened(taking(self.load, samples), skipped, self.shape)


def blackened(
    load: Callable[[int], Tensor], skips: Sequence[Skip], size: int
) -> Callable[[int], Tensor]:
    """`load`, with black pixels for these samples. Raises DatasetError if no others are left."""
    skipped = frozenset(skip.sample for skip in skips if skip.sample is not None)
    if not skipped:
        return load
    first = next((i for i in range(size) if i not in skipped), None)
    if first is None:
        raise DatasetError("the skip list leaves no sample", "Name only what is broken.")
    return Blackened(load, skipped, tuple(load(first).shape))
