"""The root group of a store: its attributes, and the mark of one that is being created."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import zarr

from stages.cache import layout
from stages.cache.arrays import open_group
from stages.cache.lock import half_written
from stages.errors import CacheError

UNFINISHED = {"format": layout.FORMAT, "unfinished": True}
"""The root attributes of a cache that is being created."""


class EncodingAttributes(msgspec.Struct, frozen=True):
    """How rows are stored: the name of an encoding."""

    name: str


class RootAttributes(msgspec.Struct, frozen=True):
    """The root attributes of a cache, as JSON has them."""

    identity: dict[str, Any]
    identity_digest: str
    encoding: EncodingAttributes
    provenance: dict[str, Any]
    pixel_probes: list[int]


def exists(path: Path) -> bool:
    """Whether a finished root lies at `path`: not in an empty folder, nor in what an interrupted
    creation left. Raises CacheError if something else lies there.
    """
    if not path.exists():
        return False
    if path.is_dir() and set(path.iterdir()) <= set(half_written(path)):
        return False
    return open_group(path, "r").attrs.asdict() != UNFINISHED


def unfinished_group(path: Path) -> zarr.Group:
    """An empty root group, marked as unfinished; replaces one that is so marked.

    The mark goes down first and stays until the attributes replace it, so that nothing but our own
    leftovers is ever removed.
    """
    if exists(path):
        raise CacheError(f"there is a cache at {path} already", "Choose another path.")
    for leftover in path.glob("*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "zarr.json":
            leftover.unlink()
    if (path / "zarr.json").exists():
        return open_group(path, "r+")
    # A copy: zarr keeps the dict and changes it with the attributes.
    return zarr.create_group(path, zarr_format=3, attributes=dict(UNFINISHED))


def read_attributes(path: Path, group: zarr.Group) -> RootAttributes:
    """The root attributes. Raises CacheError for another format, a newer version, or damage."""
    attributes = group.attrs.asdict()
    if attributes == UNFINISHED:
        raise CacheError(
            f"{path} was never finished being created", "Run `pipeline cache-teacher` again."
        )
    if attributes.get("format") != layout.FORMAT:
        raise CacheError(
            f"{path} is not a teacher-logit cache",
            "Give the folder that `pipeline cache-teacher --out` made.",
        )
    version = attributes.get("version")
    if version != layout.VERSION:
        raise CacheError(
            f"{path} has format version {version}; this program reads {layout.VERSION}",
            "Install the version of teacher-cache that wrote it, or a newer one.",
        )
    try:
        return msgspec.convert(attributes, RootAttributes)
    except msgspec.ValidationError as error:
        raise CacheError(f"the attributes of {path} are damaged: {error}") from error
