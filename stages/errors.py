"""Errors that a user can act on: printed as cause and remedy, exit code 2.

Everything in `stages` may import this module. A `PipelineError` is printed without a traceback; any
other exception is a bug and keeps its traceback (exit code 1).
"""

import contextlib
import signal
from collections.abc import Iterator


class PipelineError(Exception):
    """What went wrong and what to do about it, in at most three lines."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause if not remedy else f"{cause}\n{remedy}")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["PipelineError"], tuple[str, str]]:
        # Errors cross process boundaries (DataLoader workers, Dask): keep both parts.
        return type(self), (self.cause, self.remedy)


class ConfigError(PipelineError, ValueError):
    """A key, value or combination of options that cannot be run."""


class DatasetError(PipelineError, ValueError):
    """Images or labels that are missing, unreadable or not what they should be."""


class ModelError(PipelineError, ValueError):
    """An unknown model, or weights that do not belong to it."""


class ViewError(PipelineError, ValueError):
    """A view or policy that does not exist."""


class CacheError(PipelineError, RuntimeError):
    """A store that is missing, incomplete, of another format, or that cannot be written."""


class UnansweredError(PipelineError, RuntimeError):
    """A file or an object store that cannot be read: the bytes may well be intact.

    It is not a CacheError, so that it is not handled as damage.
    """


class IdentityError(CacheError):
    """A cache that was made from something else than what it is used with."""


class AnchorError(CacheError):
    """A block that is intact, and another one that it depends on that is not."""


class ChangedImagesError(IdentityError):
    """A dataset whose images are no longer those that a cache was made from."""


class RunError(PipelineError, RuntimeError):
    """A run directory that cannot be used as asked."""


class StoppedError(RunError):
    """Work that a signal has stopped. exit_code: 128 and the signal's number, as shells have it."""

    def __init__(self, cause: str, remedy: str = "", signal_number: int = signal.SIGTERM) -> None:
        super().__init__(cause, remedy)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type["StoppedError"], tuple[str, str, int]]:  # type: ignore[override]
        return type(self), (self.cause, self.remedy, self.exit_code - 128)


class RankError(PipelineError, RuntimeError):
    """Another process of the same launch that failed, ended or does not answer."""


@contextlib.contextmanager
def refusals(kind: type[PipelineError], cause: str, remedy: str = "") -> Iterator[None]:
    """Raise an error of this kind, with the system's reason after its cause, where the system
    refuses (OSError) what is done inside.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{cause}: {error.strerror or error}", remedy) from error
