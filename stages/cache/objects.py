"""The objects of a store, whatever holds it: bytes under keys, read, written, listed, measured."""

import asyncio
from collections.abc import Sequence

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from stages.cache.location import ask
from stages.cache.lock import is_half_written


def read_object(store: Store, key: str) -> bytes | None:
    """An object's bytes, None if there is none."""
    value = ask(store, store.get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


def read_objects(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """The bytes of several objects, asked for at the same time; None where there is none."""
    prototype = default_buffer_prototype()

    async def read() -> list[bytes | None]:
        values = await asyncio.gather(*(store.get(key, prototype) for key in keys))
        return [None if value is None else value.to_bytes() for value in values]

    return ask(store, read()) if keys else []


def sizes_of(store: Store, keys: Sequence[str]) -> list[int | None]:
    """The sizes of several objects in bytes, asked for at once; None where there is none."""

    async def size(key: str) -> int | None:
        try:
            return await store.getsize(key)
        except FileNotFoundError:
            return None

    async def sizes() -> list[int | None]:
        return await asyncio.gather(*map(size, keys))

    return ask(store, sizes()) if keys else []


def write_object(store: Store, key: str, content: bytes) -> None:
    """Write an object whole: temporary file and rename on disk, one PUT in an object store."""
    ask(store, store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def list_objects(store: Store, prefix: str) -> list[str]:
    """The keys under a prefix that ends in a slash."""

    async def collect() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    return ask(store, collect())


def first_entry(store: Store) -> str | None:
    """The name of something right under the root that somebody put there, None if there is none.

    Nothing further down is looked at: the root may be a whole disk.
    """

    async def first() -> str | None:
        async for name in store.list_dir(""):
            if not (name in _DROPPED or name.startswith("._") or is_half_written(name)):
                return name
        return None

    return ask(store, first())


_DROPPED = (".DS_Store", "Thumbs.db", "desktop.ini", "lost+found")
"""What systems leave in folders by themselves."""


def folders(store: Store, folder: str) -> list[str]:
    """The names right under a folder, but for its document, hidden files and what a killed writer
    left.
    """
    return [name for name in entries(store, folder) if name != "zarr.json"]


def entries(store: Store, folder: str) -> list[str]:
    """As `folders`, with the document where there is one. Of what is a file: nothing."""

    async def collect() -> list[str]:
        return [name async for name in store.list_dir(folder)]

    found = ask(store, collect())
    return sorted(name for name in found if not (name.startswith(".") or is_half_written(name)))
