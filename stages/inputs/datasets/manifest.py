"""What lies in a folder of images, remembered between runs: a million files are not listed again.

The manifest lies in the user's cache directory (XDG_CACHE_HOME or ~/.cache, teacher-cache/folders),
never in the dataset. It is believed while every folder of the dataset has the times it had when it
was listed, and some files, drawn at random, their sizes: adding, removing or renaming a file
changes its folder. A manifest that is damaged, or that cannot be written, is one that is not there.

Fails when: a file is overwritten in place with other bytes, its folder keeps its times and the file
is not among those looked at. `data.rescan` lists again.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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


class _Manifest(msgspec.Struct, frozen=True, array_like=True):
    """times: of every folder, by its path relative to the dataset's, (mtime, ctime) in ns."""

    version: int
    listing: FolderListing
    times: dict[str, tuple[int, int]]


def remembered(
    kind: str, base: Path, scan: Callable[[], FolderListing], rescan: bool = False
) -> FolderListing:
    """What `scan` gives for the folder `base`, from its manifest where that still holds.

    kind: who lists, where several ways of listing may meet at one folder.
    """
    path = manifest_path(kind, base)
    if path and not rescan and (known := _read(path)) and _holds(base, known):
        return known.listing
    started = time.time_ns()
    listing = scan()
    times = _times(base, listing.folders or _folders(listing))
    if DANGLING in listing.passed_over:
        return listing
    if path and all(mtime < started - SETTLED_NS for mtime, _ in times.values()):
        _write(path, _Manifest(VERSION, listing, times))
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


def _times(base: Path, folders: list[str]) -> dict[str, tuple[int, int]]:
    # ctime as well: copying tools set mtimes back to those of the original.
    stats = {folder: os.stat(os.path.join(base, folder)) for folder in folders}
    return {folder: (stat.st_mtime_ns, stat.st_ctime_ns) for folder, stat in stats.items()}


def _holds(base: Path, manifest: _Manifest) -> bool:
    listing = manifest.listing
    try:
        return _times(base, list(manifest.times)) == manifest.times and all(
            os.path.getsize(os.path.join(base, listing.paths[i])) == listing.sizes[i]
            for i in fixed_sample(len(listing.paths))[:CHECKED_FILES]
        )
    except OSError:
        return False


def _read(path: Path) -> _Manifest | None:
    """A whole manifest of this version, or None. First line: the digest of what follows."""
    try:
        kept, _, content = path.read_bytes().partition(b"\n")
        if kept.decode() != digest([content]):
            return None
        manifest = msgspec.json.decode(content, type=_Manifest)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    return manifest if manifest.version == VERSION else None


def _write(path: Path, manifest: _Manifest) -> None:
    with suppress(OSError, ValueError):  # names that are not UTF-8 are a ValueError
        content = msgspec.json.encode(manifest)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, b"\n".join([digest([content]).encode(), content]), shared=True)
