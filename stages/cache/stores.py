"""Stores that distinguish missing objects from read errors.

Zarr reads a missing object as zeros, and repair would compute it again. So an object counts as
missing only if that is certain: a file that may not be opened, or that is not a regular file, is an
error; an object store that answers 404 is asked for a listing, and then once more.
"""

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from stages.errors import UnansweredError

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
