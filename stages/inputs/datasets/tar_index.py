"""Where the images of tar shards lie: samples as WebDataset writes them, found once.

A sample is the members of a shard that have its key: a member's name up to the first dot after its
folders. What follows the dot, in any case, says what a member is: an image, its class (`.cls`, a
number) or a `.json` with the class as "label" or "cls". Only headers and classes are read.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from stages.errors import DatasetError
from stages.inputs.datasets.callables import MOST_CLASSES
from stages.inputs.datasets.listing import extensions

NO_LABEL = -1
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_BLOCK = 512
MOST_LABEL_BYTES = 2**20
"""Of a `.cls` or a `.json`: what is larger is read by mistake."""
_THREADS = 8
"""Shards that are read at once: on network storage headers are waited for."""


class ShardIndex(msgspec.Struct, frozen=True, array_like=True):
    """The images of one shard in its order. name: relative to the dataset's folder. members: their
    names. offsets, sizes: of their bytes. labels: NO_LABEL where there is none.
    """

    name: str
    members: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    passed_over: dict[str, int]


class TarListing(msgspec.Struct, frozen=True, array_like=True):
    """The images of several shards, in order."""

    shards: list[ShardIndex]

    @property
    def passed_over(self) -> dict[str, int]:
        """How many members of which kind are not taken."""
        return dict(sum((Counter(shard.passed_over) for shard in self.shards), Counter()))

    @property
    def watched(self) -> list[str]:
        """The shards."""
        return [shard.name for shard in self.shards]

    @property
    def sized(self) -> tuple[list[str], list[int]]:
        """Nothing: a file's own times change with it."""
        return [], []

    @property
    def paths(self) -> list[str]:
        """SHARD/MEMBER of every image."""
        return [f"{shard.name}/{member}" for shard in self.shards for member in shard.members]

    @property
    def labels(self) -> list[int]:
        """Of every image."""
        return [label for shard in self.shards for label in shard.labels]

    @property
    def sizes(self) -> list[int]:
        """Of every image, in bytes."""
        return [size for shard in self.shards for size in shard.sizes]


def index_shards(base: Path, names: Sequence[str], labelled: bool) -> TarListing:
    """labelled: read the classes. Raises DatasetError for the first shard that cannot be used."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return TarListing(list(pool.map(lambda name: index_shard(base, name, labelled), names)))


def index_shard(base: Path, name: str, labelled: bool = True) -> ShardIndex:
    """The images of the shard `base / name`. Raises DatasetError for what is no whole tar file, is
    compressed, has two images of one key, a class that is no number, or no images.
    """
    path = base / name
    found = _Found(path, labelled)
    try:
        with path.open("rb") as file:
            _check_plain(file, path)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or they take a gigabyte
                    found.take(member, file)
                end = os.pread(file.fileno(), _BLOCK, tar.offset)
    except tarfile.TarError as error:
        raise _truncated(path, len(found.images), str(error)) from error
    except OSError as error:
        raise DatasetError(
            f"cannot read shard {path}: {error.strerror}", "Restore it or allow reading it."
        ) from error
    if end != bytes(_BLOCK):  # tarfile ends where a header cannot be read, and says nothing
        raise _truncated(path, len(found.images), "the mark of its end is missing")
    if not found.images:
        there = ", ".join(f"{n:,} {kind}" for kind, n in found.passed_over.items())
        only = f", only: {there}" if there else ""
        raise DatasetError(f"shard {path} has no images{only}", "Leave it out of the pattern.")
    return found.index(name)


def key_and_extension(member: str) -> tuple[str, str] | None:
    """The key of a member's sample and its extension in lower case; None for a name that has none,
    begins with a dot, or is WebDataset's own (`__word__`).
    """
    match = _NAME.fullmatch(member)
    if match is None or re.search(r"(^|/)__[^/]*__($|/)", member):
        return None
    return match[1], match[2].lower()


# ---- details --------------------------------------------------------------------------------


def _check_plain(file: BinaryIO, path: Path) -> None:
    start = os.pread(file.fileno(), 8, 0)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DatasetError(
                f"shard {path} is compressed ({kind}): its images cannot be read one by one",
                "Decompress it. The images in it are compressed already.",
            )


def _truncated(path: Path, images: int, why: str) -> DatasetError:
    return DatasetError(
        f"shard {path} is no whole tar file: {why} ({images:,} images before)",
        "Copy or make it again, or leave it out of the pattern.",
    )


@dataclass
class _Found:
    """What a shard holds so far. images: key -> name, offset, bytes. classes, noted: key -> label,
    of a `.cls` and of a `.json`.
    """

    path: Path
    labelled: bool
    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    too_large: dict[str, tuple[str, int]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)

    def take(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Note what a member is. Raises DatasetError."""
        if member.isdir():
            return
        parts = key_and_extension(member.name)
        if not member.isreg() or member.issparse():
            self.passed_over["special file"] += 1
        elif parts is None:
            self.passed_over["without key"] += 1
        elif f".{parts[1]}" in extensions():
            if parts[0] in self.images:
                raise DatasetError(
                    f"shard {self.path} has two images of the key {parts[0]}: "
                    f"{self.images[parts[0]][0]} and {member.name}",
                    "Write each sample once, with one image.",
                )
            self.images[parts[0]] = (member.name, member.offset_data, member.size)
        elif parts[1] in ("cls", "json"):
            if self.labelled and member.size > MOST_LABEL_BYTES:
                self.too_large[parts[0]] = (f"{self.path}/{member.name}", member.size)
            elif self.labelled:
                content = os.pread(file.fileno(), member.size, member.offset_data)
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                self._label(*parts, content, f"{self.path}/{member.name}")
        else:
            self.passed_over[f".{parts[1]}"] += 1

    def _label(self, key: str, extension: str, content: bytes, where: str) -> None:
        if extension == "cls":
            self.classes[key] = _number(content.decode(errors="replace").strip(), where)
            return
        try:
            values = msgspec.json.decode(content)
        except (ValueError, msgspec.MsgspecError) as error:
            raise DatasetError(f"{where} is no JSON: {error}", "Write the shard again.") from error
        if isinstance(values, dict):
            label = values.get("label", values.get("cls"))
            if label is not None:
                self.noted[key] = _number(label, where)

    def index(self, name: str) -> ShardIndex:
        """Its images, each with its class, that of a `.cls` before that of a `.json`."""
        members, offsets, sizes = (
            list(column) for column in zip(*self.images.values(), strict=True)
        )
        labels = [self.classes.get(k, self.noted.get(k, NO_LABEL)) for k in self.images]
        for key, (where, size) in self.too_large.items():
            if key in self.images and key not in self.classes:
                raise DatasetError(
                    f"{where} has {size:,} bytes, a label at most {MOST_LABEL_BYTES:,}",
                    "Write a KEY.cls with the class number beside it, or use --no-labels.",
                )
        alone = len({*self.classes, *self.noted} - {*self.images})
        passed = self.passed_over + Counter({"class without image": alone} if alone else {})
        return ShardIndex(name, members, offsets, sizes, labels, dict(passed))


def _number(label: Any, where: str) -> int:
    """Raises DatasetError unless it is a class number."""
    if isinstance(label, str) and re.fullmatch(r"[+-]?\d{1,18}", label, re.ASCII):
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool):
        raise DatasetError(
            f"the label of {where} is {str(label)[:40]!r}, no class number",
            "Labels are integers that count from 0; their names stand in classes.txt.",
        )
    if not 0 <= label < MOST_CLASSES:
        raise DatasetError(
            f"the label of {where} is {label}",
            f"Labels are integers that count from 0, below {MOST_CLASSES:,}.",
        )
    return label
