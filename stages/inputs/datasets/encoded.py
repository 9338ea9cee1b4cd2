"""Datasets of compressed images: what their loaders have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from stages.inputs.datasets import nvjpeg
from stages.inputs.datasets.compressed import Decoding, Mode, decode


class Encoded(ABC):
    """Loads the i-th of some compressed images.

    mode: grey or colour. command: what `pipeline check-data` has to be given. decoding: how.
    """

    mode: Mode
    command: str
    decoding: Decoding

    @abstractmethod
    def compressed(self, index: int) -> tuple[Path | bytes, str]:
        """The image's file or bytes, and what to call it. Raises DatasetError."""

    def __call__(self, index: int) -> Tensor:
        """uint8 (C, H, W). Raises DatasetError."""
        return self.many([index])[0]

    def many(self, indices: Sequence[int]) -> list[Tensor]:
        """As each by itself; on a GPU in one go."""
        sources = [self.compressed(index) for index in indices]
        if self.decoding.decoder == "nvjpeg":
            return nvjpeg.decode_all(sources, self.mode, self.command)
        return [decode(*source, self.mode, self.command, self.decoding) for source in sources]
