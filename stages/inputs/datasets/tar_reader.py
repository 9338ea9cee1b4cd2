"""Reads images out of tar shards by offset, in any order, process and thread."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import WHOLE, Decoding, Mode
from stages.inputs.datasets.encoded import Encoded

OPEN_SHARDS = 64
"""Files that a process keeps open."""


class Shard(msgspec.Struct, frozen=True):
    """A tar file as it was when it was indexed. changed: its time, in ns."""

    path: str
    bytes: int
    changed: int

    def check(self, found: os.stat_result) -> None:
        """Raise DatasetError if it is another by now."""
        if (found.st_size, found.st_mtime_ns) != (self.bytes, self.changed):
            raise DatasetError(
                f"shard {self.path} has changed since it was indexed",
                "Give the command again; a cache is of the shards that it was made from.",
            )


class _Opened:
    """A file that is open for as long as somebody reads it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(OPEN_SHARDS)
def _opened(shard: Shard) -> _Opened:
    return _Opened(shard.path)


@dataclass(frozen=True)
class TarImages(Encoded):
    """Decodes the i-th of some images in shards; travels to workers as it is, threads share it.

    paths: SHARD/MEMBER, relative to root. places: int64 (N, 3): number of the shard, offset, bytes.
    """

    root: Path
    shards: tuple[Shard, ...]
    paths: tuple[str, ...]
    places: NDArray[np.int64]
    command: str
    mode: Mode = "RGB"
    decoding: Decoding = WHOLE

    def taking(self, samples: Sequence[int]) -> "TarImages":
        """The same for some of the images."""
        paths = tuple(self.paths[sample] for sample in samples)
        return replace(self, paths=paths, places=self.places[list(samples)])

    def compressed(self, index: int) -> tuple[bytes, str]:
        """The image's bytes, and what to call it. Reads without a position that another process or
        thread could move.
        """
        name = str(self.root / self.paths[index])
        number, offset, size = self.places[index].tolist()
        shard = self.shards[number]
        try:
            opened = _opened(shard)
            shard.check(os.fstat(opened.number))
            content = os.pread(opened.number, size, offset)
        except OSError as error:
            raise DatasetError(
                f"cannot read image {name}: {error.strerror}", "Restore the shard."
            ) from error
        if len(content) != size:
            raise DatasetError(
                f"cannot read image {name}: its shard has become shorter", "Restore the shard."
            )
        return content, name
