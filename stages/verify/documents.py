"""Faults of what is not a block: metadata, arrays that do not grow, the test split."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from stages.cache import LogitCache, layout, metadata
from stages.cache.arrays import get_array, open_group
from stages.cache.blocks import BlockGroup
from stages.cache.layout import BlockId
from stages.cache.records import unsealed
from stages.cache.storage import Location, entries, folders, read_object
from stages.errors import CacheError
from stages.folds import fold_faults
from stages.inputs.datasets.dataset import labels_digest
from stages.verify.blocks import object_faults
from stages.verify.faults import Fault
from stages.verify.known_views import known_views


def root_faults(where: Location) -> Iterator[Fault]:
    """Of the root's attributes, without which nothing else can be judged; and of their copy."""
    try:
        group = open_group(where)
        metadata.read_attributes(where, group.attrs.asdict())
    except CacheError as error:
        yield Fault("root attributes", error.cause)
        return
    try:
        (copy,) = unsealed(read_object(group.store, metadata.COPY) or b"")
        if copy != group.attrs.asdict():
            yield Fault(metadata.COPY, "is not a copy of the root's attributes")
    except ValueError:
        yield Fault(metadata.COPY, "is damaged")


def document_faults(where: Location) -> list[Fault]:
    """Documents that say more than Zarr reads in them; what is not ours is passed over."""
    store = open_group(where).store
    faults = [
        Fault(key, "the document is damaged")
        for key in _document_keys(store)
        if not _is_intact(read_object(store, key) or b"")
    ]
    faults += [
        Fault(f"{folder}/zarr.json", "the document is not what was written")
        for folder in ("commits", "rectified")
        if not _is_empty_group(read_object(store, f"{folder}/zarr.json") or b"")
    ]
    return faults


def _document_keys(store: Store) -> Iterator[str]:
    yield "zarr.json"
    rectified = [f"rectified/{name}" for name in _rectified_folders(store)]
    for folder in [*(n for n in folders(store, "") if n in layout.FOLDERS), *rectified]:
        yield f"{folder}/zarr.json"
    for folder in rectified:
        for name in set(folders(store, folder)) & set(layout.RECTIFIED_ARRAYS):
            yield f"{folder}/{name}/zarr.json"


def _rectified_folders(store: Store) -> list[str]:
    """The names under rectified/ that hold anything of a rectification."""
    ours = {"zarr.json", *layout.RECTIFIED_ARRAYS}
    names = folders(store, "rectified")
    return [name for name in names if ours.intersection(entries(store, f"rectified/{name}"))]


def whole_array_faults(cache: LogitCache) -> Iterator[Fault]:
    """Of the arrays that do not grow with the views, and of how many views the others have."""
    identity = cache.identity.dataset
    yield from room_faults(cache, cache.blocks)
    by_block = [*cache.blocks.specs]
    claim = known_views(cache.group.store, by_block, cache.num_samples, cache.provenance)
    if claim.views > cache.num_views:
        yield Fault(claim.where, f"knows of {claim.views} views, the arrays of {cache.num_views}")
    try:
        if not torch.equal(cache.dataset_index.sort().values, torch.arange(cache.num_samples)):
            yield Fault("dataset_index", "is not a permutation of the samples")
        elif cache.labelled and labels_digest(cache.labels) != identity.labels:
            yield Fault("label", "the labels are not those of the identity")
        else:
            yield from (Fault("folds", fault) for fault in fold_faults(cache))
        _ = cache.eval_labels
    except CacheError as error:
        yield Fault("whole arrays", error.cause)


def room_faults(cache: LogitCache, blocks: BlockGroup) -> Iterator[Fault]:
    """Of how many views the arrays of a group have room for: as many as the cache has."""
    for name in blocks.specs:
        room = get_array(blocks.group, name).shape[0]
        if room != cache.num_views:
            where = f"{blocks.group.path}/{name}".lstrip("/")
            yield Fault(where, f"has room for {room} views, not {cache.num_views}")


def eval_faults(cache: LogitCache) -> list[Fault]:
    """Of the test split, which is one block."""
    faults, record = [], None
    if not cache.tested:
        return []
    for _, found, damaged in cache.eval_commits.inspect():
        faults += [Fault(key, "the record is damaged", key=key) for key in damaged]
        record = found.get(0, record)
    if faults or record is None:
        return faults or [Fault("eval_logits", "the test split is not there yet")]
    keys = {"eval_logits/c/0/0", "eval_prediction/c/0"}
    whats = object_faults(cache.group.store, record, keys)[1]
    return [Fault("eval_logits", what, "eval", BlockId(0, 0)) for what in whats]


def rectification_names(cache: LogitCache, faults: list[Fault]) -> list[str]:
    """The rectifications, by their folders and their records: also damaged or deleted ones."""
    try:
        known = set(cache.rectifications)
    except CacheError as error:
        faults.append(Fault("rectified", error.cause))
        known = set()
    store = cache.group.store
    return sorted(known | {*_rectified_folders(store), *folders(store, "commits/rectified")})


# ---- documents, as Zarr reads them ----------------------------------------------------------


def _is_intact(document: bytes) -> bool:
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


def _is_empty_group(document: bytes) -> bool:
    """Whether a zarr.json is that of a group without attributes."""
    try:
        known = json.loads(document)
    except ValueError:
        return False
    return _is_intact(document) and known["node_type"] == "group" and not known.get("attributes")


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
