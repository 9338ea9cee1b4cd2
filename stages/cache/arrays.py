"""Zarr, as this store uses it: groups, arrays by spec, reads that say what is damaged.

Zarr accepts a document whose shape, fill value or attributes have changed, and would then read
something else. So arrays are compared with what `layout.py` says when a cache is opened and when it
is verified.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import Buffer
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import MemoryStore, StorePath

from stages.cache.identity import weights_digest
from stages.cache.layout import MAX_VIEWS, ArraySpec, BlockGrid, BlockId, block_key, whole_key
from stages.cache.storage import Location, answered, ask, open_store
from stages.errors import CacheError, PipelineError, UnansweredError


def open_group(where: Location, writable: bool = False) -> zarr.Group:
    """The Zarr v3 group at a location. Raises CacheError if there is none."""
    missing = CacheError(f"no cache at {where}", "Make one with `pipeline cache-teacher`.")
    if isinstance(where, Path) and not where.exists():
        raise missing
    store = open_store(where, read_only=not writable)
    try:
        with answered(where):
            return zarr.open_group(store, mode="r+" if writable else "r", zarr_format=3)
    except UnansweredError:
        raise
    except Exception as error:  # zarr raises many kinds on damaged documents
        if isinstance(where, str) and isinstance(error, FileNotFoundError):
            raise missing from error
        raise CacheError(
            f"{where} is not a teacher-logit cache: {type(error).__name__}",
            "Give what `pipeline cache-teacher --out` made.",
        ) from error


def subgroup(group: zarr.Group, name: str) -> zarr.Group:
    """A group inside a group."""
    child = member(group, name)
    if not isinstance(child, zarr.Group):
        raise CacheError(f"{group.store_path}: group '{name}' is missing")
    return child


def get_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of a group."""
    child = member(group, name)
    if not isinstance(child, zarr.Array):
        raise CacheError(f"{group.store_path}: array '{name}' is missing")
    return child


def member(group: zarr.Group, name: str) -> zarr.Array[Any] | zarr.Group | None:
    """An array or a group of a group; None if it is missing. Raises CacheError if it is damaged."""
    try:
        with answered(group.store_path):
            return group.get(name)
    except UnansweredError:
        raise
    except Exception as error:  # zarr raises many kinds on damaged documents
        raise CacheError(
            f"{group.store_path}: the metadata of '{name}' is damaged: {type(error).__name__}",
            "Run `pipeline verify CACHE --repair`.",
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
        filters=[TransposeCodec(order=spec.stored_order)] if spec.stored_order else None,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=False if spec.dtype == "bool" else 0,
        config={"write_empty_chunks": True},  # a block of zeros is a block all the same
        overwrite=True,
    )


def array_digest(name: str, spec: ArraySpec, values: Tensor) -> str:
    """sha256 (hex, 32 digits) of the values of an array, in its stored dtype."""
    return weights_digest({name: values.to(getattr(torch, spec.dtype))})


def read_array(group: zarr.Group, name: str) -> Tensor:
    """All of an array, as `read_values` gives it."""
    return read_values(get_array(group, name))


_PIECE_BYTES = 8 * 2**20
"""Of decoded values that are asked of Zarr in one go."""


def read_rows(array: zarr.Array[Any], view: int, runs: Sequence[slice]) -> Tensor:
    """Some runs of rows of one view, one after another, as `read_values` gives them.

    Beside the result a few pieces are in memory: Zarr takes several times what it is asked for in
    one go. Much smaller pieces would be slower, as every request has its price.
    """
    shape = (sum(run.stop - run.start for run in runs), *array.shape[2:])
    values = torch.empty(shape, dtype=held_dtype(array.dtype.name))
    chunk_rows, row_bytes = int(array.chunks[1]), array.dtype.itemsize * math.prod(shape[1:])
    chunks = max(1, _PIECE_BYTES // (chunk_rows * row_bytes))
    start = 0
    for run in runs:
        for piece in pieces(run, chunks * chunk_rows):
            stop = start + piece.stop - piece.start
            values[start:stop] = read_values(array, view, piece)
            start = stop
    return values


def pieces(run: slice, rows: int) -> Iterator[slice]:
    """A run of rows, cut at the multiples of `rows`."""
    cuts = range((run.start // rows + 1) * rows, run.stop, rows)
    for start, stop in pairwise([run.start, *cuts, run.stop]):
        yield slice(start, stop)


def held_dtype(stored: str) -> torch.dtype:
    """The nearest dtype to a stored one that torch has arithmetic for."""
    widened = {"uint16": "int32", "uint32": "int64", "int32": "int64"}
    dtype: torch.dtype = getattr(torch, widened.get(stored, stored))
    return dtype


def read_values(array: zarr.Array[Any], *where: int | slice) -> Tensor:
    """Values of an array, as a tensor of the nearest dtype torch has arithmetic for.

    Raises CacheError, naming the place, if bytes are damaged.
    """
    if array.shards is None and not _has_bytes(array):
        raise CacheError(f"{array.store_path}: its values are missing")
    try:
        with answered(array.store_path):
            values = np.asarray(array[where if where else slice(None)])
    except PipelineError:  # not answered, or found to be damaged already
        raise
    except Exception as error:  # codecs raise what they like on damaged bytes
        raise CacheError(
            f"{array.store_path} is damaged at {where}: {error}",
            "Run `pipeline verify CACHE --repair`: it computes what is damaged again.",
        ) from error
    dtype = str(held_dtype(array.dtype.name)).removeprefix("torch.")
    return torch.from_numpy(values.astype(dtype, copy=False))


def _has_bytes(array: zarr.Array[Any]) -> bool:
    """Whether the one chunk of an unsharded array is there: Zarr gives zeros if it is not."""
    try:
        key = f"{array.path}/c" + "/0" * array.ndim
        return ask(array.store, array.store.getsize(key)) > 0
    except FileNotFoundError:
        return False


def encode_shard(spec: ArraySpec, grid: BlockGrid, block: int, values: Tensor) -> bytes:
    """One block of an array as the bytes of its shard. values: (n, ...), the block's rows."""
    objects: dict[str, Buffer] = {}
    array = _in_memory(spec, (1, grid.num_rows, *values.shape[1:]), grid, objects)
    array[0, grid.rows(block)] = values.numpy().astype(array.dtype, copy=False)
    return objects[block_key("a", spec, BlockId(0, block))].to_bytes()


def encode_whole(spec: ArraySpec, values: Tensor) -> bytes:
    """The values of an array that is stored whole as the bytes of its object."""
    objects: dict[str, Buffer] = {}
    array = _in_memory(spec, tuple(values.shape), BlockGrid(1, 1, 1), objects)
    array[...] = values.numpy().astype(array.dtype, copy=False)
    return objects[whole_key("a", spec)].to_bytes()


def _in_memory(
    spec: ArraySpec, shape: tuple[int, ...], grid: BlockGrid, objects: dict[str, Buffer]
) -> zarr.Array[Any]:
    """An array `a` of this shape, whose objects are put into a dictionary."""
    created, place = _created(spec, shape, grid), StorePath(MemoryStore(objects), "a")
    config = ArrayConfig.from_dict({"write_empty_chunks": True})
    return zarr.Array(zarr.AsyncArray(metadata=created, store_path=place, config=config))


def grow(group: zarr.Group, num_views: int, last: str = "") -> None:
    """Make room for more views in every array of a group; array `last` comes last."""
    for name, array in sorted(group.arrays(), key=lambda item: item[0] == last):
        dimensions = array.metadata.dimension_names  # type: ignore[union-attr]
        if dimensions and dimensions[0] == "view" and array.shape[0] < num_views:
            get_array(group, name).resize((num_views, *array.shape[1:]))


# ---- documents ------------------------------------------------------------------------------


def array_faults(
    group: zarr.Group, specs: Mapping[str, ArraySpec], sizes: Mapping[str, int], grid: BlockGrid
) -> list[str]:
    """What is wrong with the documents of these arrays."""
    faults = (_array_fault(group, name, spec, sizes, grid) for name, spec in specs.items())
    return [fault for fault in faults if fault is not None]


def _array_fault(
    group: zarr.Group, name: str, spec: ArraySpec, sizes: Mapping[str, int], grid: BlockGrid
) -> str | None:
    """What is wrong with the document of an array, if anything is.

    An array may have room for more views than `sizes` says: an append stopped half-way.
    """
    try:
        found = get_array(group, name).metadata.to_dict()
    except CacheError as error:
        return error.cause
    shape = spec.shape(sizes)
    try:
        expected = _written(spec, shape, grid)
    except (TypeError, ValueError) as error:  # attributes that speak of an array that cannot be
        return f"there can be no array '{name}' as the attributes have it: {error}"
    room: Any = found["shape"]
    if spec.by_block and room and room[0] > MAX_VIEWS:
        return f"array '{name}' claims {room[0]} views, more than any cache has"
    if spec.by_block and len(room) == len(shape) and room[0] > sizes["view"]:
        expected = expected | _plain({"shape": (room[0], *shape[1:])})
    plain = _plain(found)
    differing = [key for key in {*plain, *expected} if plain.get(key) != expected.get(key)]
    if differing:
        return f"the metadata of array '{name}' is not what was written: {sorted(differing)[0]}"
    return None


@lru_cache(maxsize=256)
def _created(spec: ArraySpec, shape: tuple[int, ...], grid: BlockGrid) -> ArrayV3Metadata:
    """What an array of this shape is created with."""
    sizes = dict(zip(spec.dimensions, shape, strict=True))
    array = create_array(zarr.create_group(MemoryStore()), "a", spec, sizes, grid)
    assert isinstance(array.metadata, ArrayV3Metadata)
    return array.metadata


@lru_cache(maxsize=256)
def _written(spec: ArraySpec, shape: tuple[int, ...], grid: BlockGrid) -> dict[str, str]:
    """The document of an array of this shape, as it was created."""
    return _plain(_created(spec, shape, grid).to_dict())


def _plain(document: Mapping[str, Any]) -> dict[str, str]:
    """The fields that say something, each as text: with 0, 0.0 and false apart."""
    return {
        key: json.dumps(value, sort_keys=True, default=str)
        for key, value in document.items()
        if value is not None
    }
