"""The JSON documents of a store: what they should be, and whether they are.

Zarr accepts a document whose shape, fill value or attributes have changed, and would then read
something else. So attributes carry a digest of themselves, and arrays are compared with what
`layout.py` says; both when a cache is opened and when it is verified.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import MemoryStore

from stages.cache.arrays import create_array, get_array
from stages.cache.layout import MAX_VIEWS, ArraySpec, BlockGrid
from stages.errors import CacheError, UnansweredError


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, sorted, with a digest of all others."""
    bare = {name: value for name, value in attributes.items() if name != "digest"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return {**json.loads(text), "digest": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(attributes: Mapping[str, Any], where: str) -> None:
    """Raise CacheError unless the attributes are what they were when they were sealed."""
    if sealed(attributes) != dict(attributes):
        raise CacheError(
            f"the attributes of {where} are damaged: their digest is another",
            "Run `pipeline verify CACHE --repair`.",
        )


def array_fault(
    group: zarr.Group, name: str, spec: ArraySpec, sizes: Mapping[str, int], grid: BlockGrid
) -> str | None:
    """What is wrong with the document of an array, if anything is.

    An array may have room for more views than `sizes` says: an append stopped half-way.
    """
    try:
        found = get_array(group, name).metadata.to_dict()
    except UnansweredError:
        raise
    except CacheError as error:
        return error.cause
    scratch = zarr.create_group(MemoryStore())
    try:
        expected = create_array(scratch, name, spec, sizes, grid).metadata.to_dict()
    except (TypeError, ValueError) as error:  # attributes that speak of an array that cannot be
        return f"there can be no array '{name}' as the attributes have it: {error}"
    room: Any = found["shape"]
    if spec.by_block and room and room[0] > MAX_VIEWS:
        return f"array '{name}' claims {room[0]} views, more than any cache has"
    if spec.by_block and len(room) == len(spec.dimensions) and room[0] > sizes["view"]:
        expected["shape"] = (room[0], *spec.shape(sizes)[1:])
    differing = [k for k in {*found, *expected} if _plain(found, k) != _plain(expected, k)]
    if differing:
        return f"the metadata of array '{name}' is not what was written: {sorted(differing)[0]}"
    return None


def is_intact(document: bytes) -> bool:
    """Whether a zarr.json says nothing but what Zarr reads in it, however it is spelt.

    So a document of another version of Zarr is intact, with its fields in another order, other
    white space, or without a field that has its default.
    """
    try:
        known = json.loads(document)
        made = ArrayV3Metadata if known["node_type"] == "array" else GroupMetadata
        again = made.from_dict(known).to_buffer_dict(default_buffer_prototype())
        return _within(known, json.loads(again["zarr.json"].to_bytes()))
    except Exception:  # zarr raises many kinds on damaged documents
        return False


def is_empty_group(document: bytes) -> bool:
    """Whether a zarr.json is that of a group without attributes."""
    try:
        known = json.loads(document)
    except ValueError:
        return False
    return is_intact(document) and known["node_type"] == "group" and not known.get("attributes")


def _within(known: Any, whole: Any) -> bool:
    """Whether all that one JSON value says the other says as well."""
    if isinstance(known, dict) and isinstance(whole, dict):
        return all(
            name in whole and _within(value, whole[name])
            for name, value in known.items()
            if value is not None
        )
    if isinstance(known, list) and isinstance(whole, list):
        return len(known) == len(whole) and all(map(_within, known, whole))
    return bool(known == whole) and isinstance(known, bool) == isinstance(whole, bool)


def _plain(document: Mapping[str, Any], key: str) -> str:
    return json.dumps(document.get(key), sort_keys=True, default=str)
