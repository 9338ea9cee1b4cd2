"""One writer a cache: a second launch on the same local store is refused while the first lives."""

import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.cache.storage import Location, error_text, unreachable
from stages.errors import CacheError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def exclusive(where: Location, shared: bool = False) -> Iterator[None]:
    """Hold the store's folder. The kernel lets go when the process ends, however it ends.

    shared: other processes of this launch will join; the folder is held until the last has ended.
    A disk that is full, or read-only, becomes a CacheError; so does an object store that does not
    answer. Object stores have no lock: `verify` finds what two launches mixed.
    """
    with (
        _with_remedy(where),
        _held(where, [fcntl.LOCK_EX, fcntl.LOCK_SH] if shared else [fcntl.LOCK_EX]),
    ):
        yield


@contextlib.contextmanager
def joined(where: Location) -> Iterator[None]:
    """Hold the store's folder together with the process of this launch that has made it `shared`,
    and tell errors as `exclusive` does.
    """
    with _with_remedy(where), _held(where, [fcntl.LOCK_SH]):
        yield


@contextlib.contextmanager
def _with_remedy(where: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{where} cannot be written: {error.strerror or error_text(error)}",
            "Everything committed so far is kept: "
            + ("make room" if error.errno in _FULL else "make it writable")
            + ", then run the same command again.",
        ) from error
    except Exception as error:
        if not unreachable(error):
            raise
        raise CacheError(
            f"{where} cannot be written: {error_text(error)}",
            "Everything committed so far is kept: run the same command again.",
        ) from error


@contextlib.contextmanager
def _held(where: Location, modes: list[int]) -> Iterator[None]:
    """Take the lock in one mode after another. Who loses it in between is refused as well."""
    if isinstance(where, str):
        yield
        return
    try:
        held = Hold(where, modes)
    except BlockingIOError:
        raise CacheError(
            f"another process is writing to {where}", "Wait for it or stop it, then try again."
        ) from None
    with held:
        yield


class Hold:
    """A folder that this process holds until `release`, or until it ends, however it ends.

    Processes that it forks do not hold it. if_possible: nothing is held where the file system
    has no such locks (NFS among them). Raises BlockingIOError where another process holds it.
    """

    def __init__(
        self, folder: Path, modes: Sequence[int] = (fcntl.LOCK_EX,), if_possible: bool = False
    ) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            for mode in modes:
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except OSError as error:
            if not (if_possible and error.errno in _NO_LOCKS):
                os.close(descriptor)
                raise
        self._descriptor: int | None = descriptor
        _HOLDS.add(self)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.release()


def _release_in_child() -> None:
    for hold in list(_HOLDS):
        hold.release()


_HOLDS: "weakref.WeakSet[Hold]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_release_in_child)
