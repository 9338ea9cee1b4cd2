"""Zarr, as this store uses it: groups, arrays by spec, reads that say what is damaged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from stages.cache.commits import CommitLog, Record, describe_objects
from stages.cache.layout import ArraySpec, BlockGrid, block_key
from stages.errors import CacheError


def open_group(path: Path, mode: Literal["r", "r+"]) -> zarr.Group:
    """The Zarr v3 group at a path. Raises CacheError if there is none."""
    if not path.exists():
        raise CacheError(f"no cache at {path}", "Make one with `pipeline cache-teacher`.")
    try:
        return zarr.open_group(path, mode=mode, zarr_format=3)
    except Exception as error:  # zarr raises many kinds on damaged documents
        raise CacheError(
            f"{path} is not a teacher-logit cache: {type(error).__name__}",
            "Give the folder that `pipeline cache-teacher --out` made.",
        ) from error


def subgroup(group: zarr.Group, name: str) -> zarr.Group:
    """A group inside a group."""
    child = _member(group, name)
    if not isinstance(child, zarr.Group):
        raise CacheError(f"{group.store_path}: group '{name}' is missing")
    return child


def get_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of a group."""
    child = _member(group, name)
    if not isinstance(child, zarr.Array):
        raise CacheError(f"{group.store_path}: array '{name}' is missing")
    return child


def _member(group: zarr.Group, name: str) -> zarr.Array[Any] | zarr.Group | None:
    try:
        return group.get(name)
    except Exception as error:  # zarr raises many kinds on damaged documents
        raise CacheError(
            f"{group.store_path}: the metadata of '{name}' is damaged: {type(error).__name__}"
        ) from error


def create_array(
    group: zarr.Group, name: str, spec: ArraySpec, sizes: Mapping[str, int], grid: BlockGrid
) -> zarr.Array[Any]:
    """An empty array as its spec says: sharded by block where it has views, one chunk otherwise."""
    shape = spec.shape(sizes)
    return group.create_array(
        name,
        shape=shape,
        shards=spec.shard(sizes, grid) if spec.by_block else None,
        chunks=spec.chunk(sizes, grid) if spec.by_block else tuple(max(1, n) for n in shape),
        dtype=spec.dtype,
        dimension_names=spec.dimensions,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=False if spec.dtype == "bool" else 0,
        config={"write_empty_chunks": True},  # a block of zeros is a block all the same
        overwrite=True,
    )


def read_array(group: zarr.Group, name: str, *where: int | slice) -> Tensor:
    """Values of an array, as a tensor of the nearest dtype torch has arithmetic for.

    Raises CacheError, naming the place, if bytes are damaged.
    """
    array = get_array(group, name)
    if array.shards is None and not _has_bytes(array):
        raise CacheError(f"{array.store_path}: its values are missing")
    try:
        values = np.asarray(array[where if where else slice(None)])
    except Exception as error:  # codecs raise what they like on damaged bytes
        raise CacheError(
            f"{array.store_path} is damaged at {where}: {error}",
            "Remove the view's records under commits/ and run the stage again: it recomputes it.",
        ) from error
    widened = {"uint16": "int64", "uint32": "int64", "int32": "int64"}
    return torch.from_numpy(values.astype(widened.get(array.dtype.name, array.dtype.name)))


def _has_bytes(array: zarr.Array[Any]) -> bool:
    """Whether the one chunk of an unsharded array is there: Zarr gives zeros if it is not."""
    try:
        key = f"{array.path}/c" + "/0" * array.ndim
        return sync(array.store.getsize(key)) > 0
    except FileNotFoundError:
        return False


def write_block(
    group: zarr.Group,
    commits: CommitLog,
    grid: BlockGrid,
    where: tuple[int, int],
    arrays: Mapping[str, Tensor],
    specs: Mapping[str, ArraySpec],
    record: Record,
) -> None:
    """Write block (view, block) of some arrays, one shard each, then its commit record."""
    view, block = where
    rows = grid.rows(block)
    keys = []
    for name, values in arrays.items():
        array = get_array(group, name)
        key = block_key(f"{group.path}/{name}".lstrip("/"), specs[name], view, block)
        sync(group.store.delete(key))  # zarr would read a damaged shard before replacing it
        array[view, rows] = values.numpy().astype(array.dtype)
        keys.append(key)
    objects = describe_objects(group.store, keys)
    commits.commit(view, block, {**record, "rows": [rows.start, rows.stop], "objects": objects})


def grow(group: zarr.Group, num_views: int, last: str = "") -> None:
    """Make room for more views in every array of a group; array `last` comes last."""
    for name, array in sorted(group.arrays(), key=lambda item: item[0] == last):
        dimensions = array.metadata.dimension_names  # type: ignore[union-attr]
        if dimensions and dimensions[0] == "view" and array.shape[0] < num_views:
            get_array(group, name).resize((num_views, *array.shape[1:]))
