"""Where a store lies, a folder or the URL of an object store, and the objects in it."""

import asyncio
import contextlib
import json
import math
import os
import re
from collections.abc import Coroutine, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from stages.cache.layout import FOLDERS, FORMAT
from stages.cache.stores import Bucket, Folder
from stages.errors import CacheError, UnansweredError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_SCHEMES = ("s3", "gs", "az")
_RETRY_SECONDS = "TEACHER_CACHE_RETRY_SECONDS"
"""In the environment: how long a request to an object store is tried again; a minute if unset."""

Answer = TypeVar("Answer")
Location = Path | str
"""A folder, or a URL as text."""


def location(path: str | Path) -> Location:
    """A Path, or the text of a URL. Raises CacheError for an unknown scheme."""
    match = _URL.match(str(path))
    if match is None:
        return Path(path)
    if match[1] not in _SCHEMES:
        raise CacheError(
            f"'{path}': caches lie in folders or behind {', '.join(f'{s}://' for s in _SCHEMES)} "
            f"URLs, not {match[1]}://"
        )
    return str(path).rstrip("/")


def is_cache(path: Path) -> bool:
    """Whether a folder says that it is a cache, finished or not."""
    try:
        document: Any = json.loads((path / "zarr.json").read_bytes())
        return bool(document["attributes"]["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def cache_around(path: Path) -> Path | None:
    """The cache that a path lies inside of, where nothing else is written; None outside of all."""
    return next((folder for folder in path.absolute().parents if is_cache(folder)), None)


def check_place(path: str | Path) -> None:
    """Raise CacheError where no cache can be: inside another one, or below a file."""
    where = location(path)
    if not isinstance(where, Path):
        return
    if (cache := cache_around(where)) is not None:
        raise CacheError(f"{where} lies inside the cache {cache}", "Choose another --out.")
    there = next((folder for folder in where.absolute().parents if folder.exists()), None)
    if there is not None and not there.is_dir():
        raise CacheError(
            f"{where} would lie below {there}, which is a file", "Choose another --out."
        )


def open_store(where: Location, read_only: bool) -> Store:
    """The store at a location; nothing is asked of an object store yet.

    Credentials come from the environment, as the provider's own tools read them.
    """
    if isinstance(where, Path):
        return Folder(where, read_only=read_only)
    try:
        import obstore.store
    except ModuleNotFoundError as error:
        raise CacheError(
            f"{where} needs the package obstore", "pip install 'teacher-cache[remote]'"
        ) from error
    timeout = timedelta(seconds=retry_seconds())
    try:
        remote = obstore.store.from_url(
            where, retry_config={"max_retries": 1000, "retry_timeout": timeout}
        )
    except Exception as error:  # obstore raises its own kinds on what it cannot parse
        raise CacheError(
            f"{where} cannot be used as an object store: {error_text(error)}",
            "Check the URL and the credentials in the environment.",
        ) from error
    return Bucket(remote, read_only=read_only)


def retry_seconds() -> float:
    """How long a request is tried again. Raises CacheError unless that is a positive number."""
    text = os.environ.get(_RETRY_SECONDS, "60")
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise CacheError(f"{_RETRY_SECONDS} is a positive number of seconds, not '{text}'")


def error_text(error: Exception) -> str:
    """The first line of an error, or both ends of it: the status may come last."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"


@contextlib.contextmanager
def answered(where: object) -> Iterator[None]:
    """Raise UnansweredError if an object store does not answer what is asked in here."""
    try:
        yield
    except Exception as error:
        if not unreachable(error):
            raise
        raise UnansweredError(
            f"{where} cannot be read or written: {error_text(error)}",
            "Nothing is damaged by that. Check the URL, the credentials in the environment and the "
            "connection, then run the same command again.",
        ) from error


def ask(store: Store, question: Coroutine[Any, Any, Answer]) -> Answer:
    """Wait for what a method of a store gives. Raises UnansweredError as `answered` does."""
    with answered(store):
        return sync(question)


def unreachable(error: BaseException) -> bool:
    """Whether an object store did not answer, or refused; the bytes may well be intact."""
    return type(error).__module__.startswith(("obstore", "builtins.obstore"))


# ---- objects --------------------------------------------------------------------------------


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
    """The name of a foreign object right under the root, None if there is none.

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


# ---- what a killed writer left --------------------------------------------------------------

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""How zarr's local store names a file until it is whole."""


def half_written(where: Location) -> list[Path]:
    """What a killed writer left of objects: never part of a cache, they get their name whole.

    Object stores have none: a PUT is whole or nothing. Folders that are not ours are not looked at.
    """
    if isinstance(where, str):
        return []
    found = [p for p in where.iterdir() if is_half_written(p.name)]
    for name in FOLDERS:
        found += [p for p in (where / name).rglob("*.partial") if is_half_written(p.name)]
    return found


def is_half_written(name: str) -> bool:
    """Whether a file has the name that Zarr's local store gives one until it is whole."""
    return _TEMPORARY.search(name) is not None


def remove_half_written(where: Location) -> None:
    """Delete what a killed writer left; only who holds the store knows that it was killed."""
    for leftover in half_written(where):
        leftover.unlink()
