"""Compressed images, in files or in memory, to pixels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.errors import DatasetError

Mode = Literal["L", "RGB"]

SAMPLED_MODES = 64
"""How many images decide whether a dataset is grey; one in colour among grey is an error."""
_GREY = ("1", "L", "LA")


def decode(source: Path | bytes, name: str, mode: Mode) -> Tensor:
    """uint8 (C, H, W). Raises DatasetError, with the image's name, for what cannot be decoded."""
    with _opened(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise DatasetError(
                f"image {name} has more than 8 bits a channel", "Convert the images to 8 bits."
            )
        if mode == "L" and image.mode not in _GREY:
            raise DatasetError(
                f"image {name} is in colour, others of the dataset are grey",
                "Convert them alike, to grey or to colour.",
            )
        pixels = np.array(image.convert(mode))
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def common_mode(images: Iterable[tuple[Path | bytes, str]]) -> Mode:
    """Grey if all of these (source, name) are, else colour. Only their headers are read."""
    modes = set()
    for source, name in images:
        with _opened(source, name) as image:
            modes.add(image.mode)
    return "L" if modes and modes.issubset(_GREY) else "RGB"


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image being read. Raises DatasetError, naming it, for whatever Pillow cannot read."""
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            yield image
    except DatasetError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"cannot read image {name}: {error}", "Replace the file or remove it."
        ) from error
