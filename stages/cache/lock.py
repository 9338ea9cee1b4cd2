"""One writer a cache: a second launch on the same local store is refused while the first lives."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from stages.errors import CacheError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""How zarr's local store names a file until it is whole."""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the store's folder. The kernel lets go when the process ends, however it ends.

    A disk that is full, or read-only, becomes a CacheError.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"another process is writing to {path}", "Wait for it or stop it, then try again."
            ) from None
        yield
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror or error}",
            "Everything committed so far is kept: make room, then run the same command again.",
        ) from error
    finally:
        os.close(folder)


def half_written(path: Path) -> list[Path]:
    """What a killed writer left of objects: never part of a cache, they get their name whole."""
    return [p for p in path.rglob("*.partial") if _TEMPORARY.search(p.name)]
