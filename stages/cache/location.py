"""Where a store lies: a folder, or the URL of an object store."""

import contextlib
import json
import math
import os
import re
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.sync import sync

from stages.cache.layout import FORMAT
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
    """The cache that a path lies inside of, where nobody else may write; None outside of all."""
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
            f"{where} cannot be used as an object store: {told(error)}",
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


def told(error: Exception) -> str:
    """The first line of an error: obstore's go on for a page."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@contextlib.contextmanager
def answered(where: object) -> Iterator[None]:
    """Raise UnansweredError if an object store does not answer what is asked in here."""
    try:
        yield
    except Exception as error:
        if not unreachable(error):
            raise
        raise UnansweredError(
            f"{where} cannot be read or written: {told(error)}",
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
