"""Objects whose bytes are what their commit record says: hashed as they are read.

A record has the sha256 of an object, and the length and sha256 of each part of it: the chunks of a
shard and its index, one after another. So whoever reads some chunks hashes these alone, and nothing
is read twice.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import StorePath, WrapperStore

from stages.errors import CacheError

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


def checked(group: zarr.Group, objects: Mapping[str, Described]) -> zarr.Group:
    """The same group, whose objects are compared with their records as they are read."""
    place = StorePath(CheckedStore(group.store, objects), group.path)
    return zarr.Group(zarr.AsyncGroup(metadata=group.metadata, store_path=place))
