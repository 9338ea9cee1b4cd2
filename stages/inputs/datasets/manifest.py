"""What lies in a folder or in shards, remembered: a million images are not listed again.

The manifest lies in the user's cache directory (XDG_CACHE_HOME or ~/.cache, teacher-cache/folders),
never in the dataset. It is believed while every folder of the dataset has the times it had when it
was listed, and some files, drawn at random, their sizes: adding, removing or renaming a file
changes its folder. Of tar shards each has to have its times. A manifest that is damaged, or that
cannot be written, is one that is not there.

Fails when: a file is overwritten in place with other bytes, its folder keeps its times and the file
is not among those looked at. `data.rescan` lists again.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from stages.files import replace_file
from stages.inputs.datasets.dataset import digest, fixed_sample

VERSION = 2
CHECKED_FILES = 1024
"""How many files, drawn at random, must still have their sizes."""
SETTLED_NS = 2 * 10**9
"""A folder changed so shortly before it was listed could change again within one tick of its file
system's clock, unseen: it is listed again next time."""
DANGLING = "dangling link"
"""A kind of file that is passed over. Its target may appear, and no folder's times would say so:
such a listing is not remembered."""


class Listing(Protocol):
    """What can be remembered; a msgspec struct."""

    @property
    def passed_over(self) -> dict[str, int]:
        """How many files of which kind were not taken."""

    @property
    def watched(self) -> list[str]:
        """Relative paths whose times change with the listing."""

    @property
    def sized(self) -> tuple[list[str], list[int]]:
        """Files, relative, and their bytes."""


Found = TypeVar("Found", bound=Listing)


class FolderListing(msgspec.Struct, frozen=True, array_like=True):
    """The images of a folder, in the order that labels and digests have.

    labels: of every image, positions in class_names. paths: relative, with `/`. sizes: in bytes.
    folders: all that were listed, relative; empty for those of the classes and of the images.
    passed_over: how many files of which kind were not taken.
    """

    class_names: list[str]
    labels: list[int]
    paths: list[str]
    sizes: list[int]
    folders: list[str] = []
    passed_over: dict[str, int] = {}

    @property
    def watched(self) -> list[str]:
        """Its folders."""
        return self.folders or _folders(self)

    @property
    def sized(self) -> tuple[list[str], list[int]]:
        """Its images."""
        return self.paths, self.sizes


class _Manifest(msgspec.Struct, frozen=True, array_like=True):
    """times: of everything watched, by its path relative to the dataset's, (mtime, ctime) in ns."""

    version: int
    listing: msgspec.Raw
    times: dict[str, tuple[int, int]]


def remembered(
    kind: str, base: Path, scan: Callable[[], FolderListing], rescan: bool = False
) -> FolderListing:
    """What `scan` gives for the folder `base`, from its manifest where that still holds.

    kind: who lists, where several ways of listing may meet at one folder.
    """
    return remembered_as(FolderListing, manifest_path(kind, base), base, scan, rescan)


def remembered_as(
    of: type[Found], path: Path | None, base: Path, scan: Callable[[], Found], rescan: bool = False
) -> Found:
    """As `remembered`, for another kind of listing. path: of the manifest, see `manifest_path`."""
    if path and not rescan and (known := _read(path, of, base)):
        return known
    started = time.time_ns()
    listing = scan()
    times = _times(base, listing.watched)
    if DANGLING in listing.passed_over:
        return listing
    if path and all(mtime < started - SETTLED_NS for mtime, _ in times.values()):
        _write(path, listing, times)
    return listing


def manifest_path(kind: str, base: Path) -> Path | None:
    """Where the manifest of a folder lies, if there is one; None for a user without a home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    key = digest([f"{kind}\n{os.path.realpath(base)}".encode(errors="surrogateescape")])
    return home / "teacher-cache" / "folders" / f"{key}.json" if home.is_absolute() else None


def _folders(listing: FolderListing) -> list[str]:
    """The dataset's folder (""), those of its classes and whatever images lie in below them."""
    folders = {"", *listing.class_names}
    for folder in {os.path.dirname(path) for path in listing.paths}:
        while folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    return sorted(folders)


def _times(base: Path, watched: list[str]) -> dict[str, tuple[int, int]]:
    # ctime as well: copying tools set mtimes back to those of the original.
    stats = {path: os.stat(os.path.join(base, path)) for path in watched}
    return {path: (stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats.items()}


def _have_sizes(base: Path, listing: Listing) -> bool:
    paths, sizes = listing.sized
    return all(
        os.path.getsize(os.path.join(base, paths[i])) == sizes[i]
        for i in fixed_sample(len(paths))[:CHECKED_FILES]
    )


def _read(path: Path, of: type[Found], base: Path) -> Found | None:
    """A whole manifest of this version that still holds, or None. First line: the digest of what
    follows.
    """
    try:
        kept, _, content = path.read_bytes().partition(b"\n")
        if kept.decode() != digest([content]):
            return None
        manifest = msgspec.json.decode(content, type=_Manifest)
        if manifest.version != VERSION or _times(base, [*manifest.times]) != manifest.times:
            return None
        listing = msgspec.json.decode(manifest.listing, type=of)
        return listing if _have_sizes(base, listing) else None
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _write(path: Path, listing: Listing, times: dict[str, tuple[int, int]]) -> None:
    with suppress(OSError, ValueError):  # names that are not UTF-8 are a ValueError
        kept = _Manifest(VERSION, msgspec.Raw(msgspec.json.encode(listing)), times)
        content = msgspec.json.encode(kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, b"\n".join([digest([content]).encode(), content]), shared=True)
