"""One writer a cache: a second launch on the same local store is refused while the first lives."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stages.errors import CacheError


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the store's folder. The kernel lets go when the process ends, however it ends.

    Also removes what a killed writer left half-written (never part of the cache: objects get their
    name only when they are whole).
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"another process is writing to {path}", "Wait for it or stop it, then try again."
            ) from None
        for leftover in path.rglob("*.partial"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)
