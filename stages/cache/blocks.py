"""Blocks: one shard of each array, then a commit record. Read back as its record has them.

Where an encoding has an anchor (`Encoding.of_anchor`), a block of any other view depends on the
anchor's block of the same rows, and on nothing else. Its record has a digest of that block's
record: it is used beside that block alone.

A commit record has the sha256 of an object, and the length and sha256 of each part of it: the
chunks of a shard and its index, one after another. A reader of some chunks hashes these alone, and
nothing is read twice.
"""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import zarr
from torch import Tensor
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import StorePath, WrapperStore

from stages.cache.arrays import encode_shard, get_array, read_rows
from stages.cache.commits import CommitLog
from stages.cache.layout import ANCHOR, ArraySpec, BlockGrid, BlockId, block_key
from stages.cache.records import Record
from stages.cache.storage import write_object
from stages.errors import AnchorError, CacheError


@dataclass(frozen=True)
class BlockGroup:
    """The arrays of one group that are written block by block: the logits, or a rectification.

    specs: those arrays, by name. Their documents are read once. of_anchor: as of the encoding.
    """

    group: zarr.Group
    commits: CommitLog
    grid: BlockGrid
    specs: Mapping[str, ArraySpec]
    of_anchor: Mapping[str, str] = field(default_factory=dict)

    def names(self, view: int) -> list[str]:
        """The arrays that a block of a view has."""
        return [name for name, spec in self.specs.items() if spec.of_view(view)]

    def key(self, name: str, at: BlockId) -> str:
        """The object that holds a block of an array."""
        return block_key(f"{self.group.path}/{name}".lstrip("/"), self.specs[name], at)

    def write(self, at: BlockId, arrays: Mapping[str, Tensor], record: Record) -> None:
        """Write a block of every array, one shard each, then its commit record.

        A shard is made in memory and put down whole, so that its record knows its digest and
        nothing that lies there is read.
        """
        rows, objects = self.grid.rows(at.block), {}
        for name, values in arrays.items():
            shard = encode_shard(self.specs[name], self.grid, at.block, values)
            key = self.key(name, at)
            write_object(self.group.store, key, shard)
            objects[key] = described(shard, self.grid.chunks_per_block)
        whole = {**record, "rows": [rows.start, rows.stop], "objects": objects}
        if self.has_anchor(at.view):
            whole["anchor"] = self._anchor_digest(at.block)
        self.commits.commit(at, whole)

    def read(
        self, names: Iterable[str], view: int, runs: Sequence[slice], block: int | None = None
    ) -> dict[str, Tensor]:
        """Some runs of rows of a view, or of one block of it, one after another: each (n, ...).

        The bytes are compared with the commit records as they are read. Raises CacheError where
        they differ.
        """
        objects = self.commits.objects_of(view, block)
        arrays = {name: checked(self._array(name, view), objects) for name in names}
        return {name: read_rows(array, view, runs) for name, array in arrays.items()}

    # ---- blocks that depend on the anchor's -----------------------------------------------

    def has_anchor(self, view: int) -> bool:
        """Whether blocks of a view depend on those of another."""
        return bool(self.of_anchor) and view != ANCHOR

    def read_anchor(self, runs: Sequence[slice], block: int | None = None) -> dict[str, Tensor]:
        """What these rows of other views are coded beside: as `read`, by the names of `of_anchor`.
        Raises AnchorError where it is not there, or damaged.
        """
        if block is not None:
            self._anchor_digest(block)  # raises where it is not there
        try:
            read = self.read(self.of_anchor.values(), ANCHOR, runs, block)
        except CacheError as error:
            raise AnchorError(error.cause, error.remedy) from error
        return {name: read[stored] for name, stored in self.of_anchor.items()}

    def check_anchor(self, view: int, block: int | None = None) -> None:
        """Raise CacheError unless the blocks of a view, or one of them, were written beside the
        anchor's as they are now, AnchorError where these are not there.
        """
        records = self.commits.of_view(view)
        for number in records if block is None else [block]:
            if records[number].get("anchor") != self._anchor_digest(number):
                raise CacheError(
                    f"{self.group.store_path}: block {number} of view {view} was written beside "
                    f"another block of view {ANCHOR} than is there now",
                    "Run `pipeline cache-teacher` again: it computes that block again.",
                )

    def stale(self) -> list[BlockId]:
        """The blocks that were written beside another block of the anchor than is there now."""
        if not self.of_anchor:
            return []
        now = {block: self._anchor_digest(block) for block in self.commits.of_view(ANCHOR)}
        others = (view for view in self.commits.views if view != ANCHOR)
        return [
            BlockId(view, block)
            for view, records in self.commits.each_view(others)
            for block, record in records.items()
            if block in now and record.get("anchor") != now[block]
        ]

    def _anchor_digest(self, block: int) -> str:
        """sha256 (hex) of the digests of the objects of an anchor's block."""
        try:
            objects = self.commits.objects_of(ANCHOR, block)
        except KeyError:
            cause = f"{self.group.store_path}: block {block} of view {ANCHOR} is not there"
            remedy = "Run `pipeline cache-teacher` again to finish it."
            raise AnchorError(cause, remedy) from None
        except CacheError as error:
            raise AnchorError(error.cause, error.remedy) from error
        lines = (f"{key}\t{_Known.of(key, objects[key]).sha256}\n" for key in sorted(objects))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _array(self, name: str, view: int) -> zarr.Array[Any]:
        """An array with room for a view. Its document is read again where it had none before."""
        array = self._opened.get(name)
        if array is None or view >= array.shape[0]:
            array = self._opened[name] = get_array(self.group, name)
        return array

    @cached_property
    def _opened(self) -> dict[str, zarr.Array[Any]]:
        return {}


# ---- bytes that are what the records say ----------------------------------------------------

_DIGITS = 16
"""Of the sha256 of a part: it tells apart what was mixed up, the whole digest is beside it."""
_ABSENT = 2**64 - 1
"""Offset and length, in the index of a shard, of a chunk that is not there."""
_INLINE = 2**15
"""Bytes that are hashed where they are: another thread costs more."""

Described = Mapping[str, Any]
"""What a record knows of an object: bytes, sha256, and of a shard its parts."""


def described(content: bytes, chunks: int = 0) -> dict[str, Any]:
    """Size and sha256 of an object, as a record keeps them; chunks: of a shard how many it has room
    for, and then its parts as well.
    """
    whole = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if not chunks:
        return whole
    index_at = len(content) - 16 * chunks - 4  # two uint64 a chunk, and a crc32c
    index = np.frombuffer(content, "<u8", 2 * chunks, index_at).reshape(chunks, 2)
    starts = {int(start) for start, _ in index if start != _ABSENT}
    cuts = sorted({0, *starts, index_at, len(content)})
    parts = [content[start:stop] for start, stop in pairwise(cuts)]
    return {**whole, "parts": [[len(part), _short(part)] for part in parts]}


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class _Known:
    """One object, as its record has it. parts: [start, stop) -> digest."""

    size: int
    sha256: str
    parts: dict[tuple[int, int], str]

    @staticmethod
    def of(key: str, record: Described) -> "_Known":
        try:
            lengths = [int(length) for length, _ in record.get("parts", ())]
            ends = list(accumulate(lengths))
            spans = zip([0, *ends[:-1]], ends, strict=True) if ends else ()
            digests = (str(digest) for _, digest in record.get("parts", ()))
            parts = dict(zip(spans, digests, strict=True))
            return _Known(int(record["bytes"]), str(record["sha256"]), parts)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"the commit record of {key} is not readable: {error!r}",
                "Run `pipeline verify CACHE --repair`: it computes that block again.",
            ) from error


class CheckedStore(WrapperStore[Store]):
    """A store that gives the bytes of known objects only if they are what the records say.

    `get` raises CacheError where an object is missing, cut off or another. Objects that are not
    known come through.
    """

    def __init__(self, store: Store, objects: Mapping[str, Described]) -> None:
        super().__init__(store)
        self._objects = objects

    def _with_store(self, store: Store) -> "CheckedStore":
        return CheckedStore(store, self._objects)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As of the store. Raises CacheError for other bytes than those of the record."""
        record = self._objects.get(key)
        if record is None:
            return await self._store.get(key, prototype, byte_range)
        known = _Known.of(key, record)
        span = _span(byte_range, known.size)
        if span is None or span in known.parts:
            value = await self._store.get(key, prototype, None if span is None else byte_range)
            expected = known.sha256 if span is None else known.parts[span]
            await self._check(
                key, value, known.size if span is None else span[1] - span[0], expected
            )
            return value
        whole = await self.get(key, prototype)  # some other span: all of it says whether it holds
        return None if whole is None else whole[span[0] : span[1]]

    async def _check(self, key: str, value: Buffer | None, size: int, digest: str) -> None:
        if value is None:
            what = "is missing"
        elif len(value) != size:
            what = f"is damaged: {len(value)} bytes, not the {size} of its commit record"
        else:
            content: Any = value.as_numpy_array()
            hashed = (
                hashlib.sha256(content)
                if size <= _INLINE
                else await asyncio.to_thread(hashlib.sha256, content)
            )
            if hashed.hexdigest()[: len(digest)] == digest:
                return
            what = "is damaged: its sha256 is not that of its commit record"
        raise CacheError(
            f"{self._store}: object {key} {what}",
            "Run `pipeline verify CACHE --repair`: it computes that block again.",
        )


def _span(byte_range: ByteRequest | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a request; None for all of an object of this size."""
    if byte_range is None:
        return None
    if isinstance(byte_range, RangeByteRequest):
        span = byte_range.start, byte_range.end
    elif isinstance(byte_range, SuffixByteRequest):
        span = size - byte_range.suffix, size
    else:
        span = byte_range.offset, size
    return None if span == (0, size) else span


def checked(array: zarr.Array[Any], objects: Mapping[str, Described]) -> zarr.Array[Any]:
    """The same array, whose objects are compared with their records as they are read."""
    place = StorePath(CheckedStore(array.store, objects), array.path)
    return zarr.Array(zarr.AsyncArray(metadata=array.metadata, store_path=place))
