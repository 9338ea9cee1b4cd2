"""The objects of a store, whatever holds it: bytes under keys, read, written, listed, measured."""

import asyncio
from collections.abc import Sequence

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from stages.cache.location import ask


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


def first_object(store: Store) -> str | None:
    """The key of some object, None if there is none at all."""

    async def first() -> str | None:
        async for key in store.list_prefix(""):
            return key
        return None

    return ask(store, first())


def folders(store: Store, folder: str) -> list[str]:
    """The names right under a folder, but for documents and what a killed writer left."""

    async def collect() -> list[str]:
        return [name async for name in store.list_dir(folder)]

    return sorted(n for n in ask(store, collect()) if not n.endswith(("zarr.json", ".partial")))
