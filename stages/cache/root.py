"""The root group of a store: its attributes, and the mark of one that is being created."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import zarr

from stages.cache import layout
from stages.cache.arrays import open_group
from stages.cache.documents import check_seal, sealed
from stages.cache.encoding import EncodingAttributes, Fidelity
from stages.cache.identity import SkippedSample
from stages.cache.location import Location, ask, open_store
from stages.cache.lock import remove_half_written
from stages.cache.objects import first_entry, read_object, write_object
from stages.cache.records import seal_records, unsealed
from stages.cache.stores import readable
from stages.errors import CacheError

UNFINISHED = {"format": layout.FORMAT, "unfinished": True}
"""The root attributes of a cache that is being created."""
COPY = "commits/attributes.json"
"""The root attributes once more: all else can be computed again, provenance cannot."""


class RootAttributes(msgspec.Struct, frozen=True):
    """The root attributes of a cache, as JSON has them."""

    identity: dict[str, Any]
    identity_digest: str
    encoding: EncodingAttributes
    shared_arrays: dict[str, str]
    provenance: dict[str, Any]
    pixel_probes: list[int]
    fidelity: Fidelity | None = None
    skipped: tuple[SkippedSample, ...] = ()


def exists(where: Location) -> bool:
    """Whether a finished root lies there: not in an empty folder, nor in what an interrupted
    creation left. Raises CacheError if something else lies there.
    """
    if isinstance(where, Path):
        with readable(where):
            if not where.exists():
                return False
            if not where.is_dir():
                raise CacheError(
                    f"{where} is not a teacher-logit cache: it is a file",
                    "Choose a folder that is empty, or not there.",
                )
    store = open_store(where, read_only=True)
    if read_object(store, "zarr.json") is None:
        if there := first_entry(store):
            raise CacheError(
                f"{where} is not a teacher-logit cache: it holds {there}",
                "Choose a folder or a prefix with nothing in it.",
            )
        return False
    return open_group(where).attrs.asdict() != UNFINISHED


def unfinished_group(where: Location) -> zarr.Group:
    """An empty root group, marked as unfinished; replaces one that is so marked.

    The mark goes down first and stays until the attributes replace it, and only what has a name of
    ours is removed.
    """
    if exists(where):
        raise CacheError(f"there is a cache at {where} already", "Choose another path.")
    store = open_store(where, read_only=False)
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
        remove_half_written(where)
    if read_object(store, "zarr.json") is None:
        # A copy: zarr keeps the dict and changes it with the attributes.
        return zarr.create_group(store, zarr_format=3, attributes=dict(UNFINISHED))
    for name in layout.FOLDERS:
        ask(store, store.delete_dir(name))
    return open_group(where, writable=True)


def write_attributes(group: zarr.Group, attributes: Mapping[str, Any]) -> None:
    """Seal and write the root attributes, their copy first."""
    whole = sealed(attributes)
    write_object(group.store, COPY, seal_records([whole]))
    group.attrs.put(whole)


def copied_attributes(where: Location) -> dict[str, Any] | None:
    """The root attributes as their copy has them; None if that is missing or damaged."""
    with contextlib.suppress(ValueError, FileNotFoundError, NotADirectoryError):
        content = read_object(open_store(where, read_only=True), COPY)
        if content is not None:
            (attributes,) = unsealed(content)
            return attributes
    return None


def restore_attributes(where: Location, attributes: dict[str, Any]) -> None:
    """Write the root document again."""
    store = open_store(where, read_only=False)
    ask(store, store.delete("zarr.json"))
    zarr.create_group(store, zarr_format=3, attributes=attributes)


def read_attributes(where: Location, attributes: Mapping[str, Any]) -> RootAttributes:
    """The root attributes. Raises CacheError for another format, a newer version, or damage."""
    if attributes == UNFINISHED:
        raise CacheError(
            f"{where} was never finished being created", "Run `pipeline cache-teacher` again."
        )
    if attributes.get("format") != layout.FORMAT:
        raise CacheError(
            f"{where} is not a teacher-logit cache",
            "Give what `pipeline cache-teacher --out` made.",
        )
    version = attributes.get("version")
    if version != layout.VERSION:
        raise CacheError(
            f"{where} has format version {version}; this program reads {layout.VERSION}",
            "Install the version of teacher-cache that wrote it, or a newer one.",
        )
    check_seal(attributes, str(where))
    try:
        return msgspec.convert(attributes, RootAttributes)
    except msgspec.ValidationError as error:
        raise CacheError(f"the attributes of {where} are damaged: {error}") from error
