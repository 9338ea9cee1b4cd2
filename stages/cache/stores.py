"""Stores that distinguish missing objects from read errors, and find damaged ones.

Zarr reads a missing object as zeros, and repair would compute it again. So an object counts as
missing only if that is certain: a file that may not be opened, or that is not a regular file, is an
error; an object store that answers 404 is asked for a listing, and then once more.

A commit record has the sha256 of an object, and the length and sha256 of each part of it: the
chunks of a shard and its index, one after another. A reader of some chunks hashes these alone, and
nothing is read twice.
"""

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore, StorePath, WrapperStore

from stages.errors import CacheError, UnansweredError

_NO_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_REMEDIES = {
    errno.EACCES: "Give yourself the permission to read it",
    errno.EPERM: "Give yourself the permission to read it",
    errno.EMFILE: "Allow more open files (`ulimit -n`)",
    errno.ENFILE: "Allow more open files (`ulimit -n`)",
}
ASK_AGAIN_SECONDS = (0.1, 0.5, 1.0)
"""Waits before an object that is listed is asked for once more."""


class Folder(LocalStore):
    """A local folder. Raises UnansweredError for what is there and cannot be read."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        with readable(path := self.root / key):
            return await super().get(key, prototype, byte_range) if self._is_file(path) else None

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        with readable(path := self.root / key):
            if not self._is_file(path):
                return None
            return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def exists(self, key: str) -> bool:
        with readable(path := self.root / key):
            return self._is_file(path)

    async def getsize(self, key: str) -> int:
        with readable(path := self.root / key):
            if not self._is_file(path):
                raise FileNotFoundError(path)
            return os.path.getsize(path)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        with readable(folder := self.root / prefix):
            # Path.rglob passes over folders that may not be read.
            for where, _, names in os.walk(folder, onerror=_raise):
                for name in names:
                    yield (Path(where) / name).relative_to(self.root).as_posix()

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        with readable(self.root / prefix):
            async for name in super().list_dir(prefix):
                yield name

    def _is_file(self, path: Path) -> bool:
        """Whether there is a file; False if there is nothing. Raises UnansweredError for anything
        else: reading a pipe would wait for ever, and what a link points to may come back.
        """
        wrong = None
        try:
            kind = stat.S_IFMT(os.stat(path).st_mode)
        except FileNotFoundError:
            inside = (p for p in (path, *path.parents) if p.is_relative_to(self.root))
            link = next((p for p in inside if p.is_symlink() and not p.exists()), None)
            if link is None:
                return False
            wrong = f"{link} is a link to {os.readlink(link)}, which is not there"
        except NotADirectoryError:
            file = next((p for p in path.parents if p.is_file()), self.root)
            if file in (self.root, *self.root.parents):
                return False  # what should be the cache is a file itself
            wrong = f"{file} is a file, not a folder"
        else:
            if kind in _NO_FILES:
                wrong = f"{path} is {_NO_FILES[kind]}, not a file"
        if wrong is None:
            return True
        raise UnansweredError(
            wrong, "Put back what was there, or remove it and run `pipeline verify CACHE --repair`."
        )


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UnansweredError for what the system has against reading."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnansweredError(
            f"{path} cannot be read: {error.strerror or error}",
            _REMEDIES.get(error.errno or 0, "Look after the disk")
            + ", then run the same command again. Nothing is known to be damaged.",
        ) from error


class Bucket(ObjectStore[Any]):
    """An object store. Raises UnansweredError for what it lists and says is not there."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        for seconds in ASK_AGAIN_SECONDS:
            if found is not None or not await self._lists(key):
                return found
            await asyncio.sleep(seconds)
            found = await super().get(key, prototype, byte_range)
        if found is None:
            raise self._contradicted(key)
        return found

    async def getsize(self, key: str) -> int:
        for seconds in ASK_AGAIN_SECONDS:
            try:
                return await super().getsize(key)
            except FileNotFoundError:
                if not await self._lists(key):
                    raise
            await asyncio.sleep(seconds)
        raise self._contradicted(key)

    async def exists(self, key: str) -> bool:
        return await super().exists(key) or await self._lists(key)

    async def _lists(self, key: str) -> bool:
        """Whether a listing has this key."""
        import obstore

        folder, before = key.rpartition("/")[0], key[:-1]
        async for some in obstore.list(self.store, folder or None, offset=before):
            for found in some:
                if found["path"] >= key:
                    return bool(found["path"] == key)
        return False

    def _contradicted(self, key: str) -> UnansweredError:
        return UnansweredError(
            f"{self}: {key} is listed, and yet the answer to reading it is 404",
            "Nothing is known to be damaged. Run the same command again, or look after the object "
            "store.",
        )


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


def checked(array: zarr.Array[Any], objects: Mapping[str, Described]) -> zarr.Array[Any]:
    """The same array, whose objects are compared with their records as they are read."""
    place = StorePath(CheckedStore(array.store, objects), array.path)
    return zarr.Array(zarr.AsyncArray(metadata=array.metadata, store_path=place))
