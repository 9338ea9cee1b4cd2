"""Compressed images, in files or in memory, to pixels."""

import errno
import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stages.errors import DatasetError
from stages.settings import Decoder

Mode = Literal["L", "RGB"]

SAMPLED_MODES = 64
"""How many images decide whether a dataset is grey; one in colour among grey is an error."""
GREY = ("1", "L", "LA")
_DEEP = ("I", "F")

# Images of up to 179 million pixels are read as any others; larger ones Pillow itself refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Decoding:
    """What is done while decoding. exif: turn an image as its EXIF orientation says, as cameras
    write it. jpeg_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as both of its sides
    keep this many pixels: fewer coefficients are transformed (libjpeg's scaling). None for whole.
    decoder: whose pixels they are; None for Pillow's.
    """

    exif: bool = False
    jpeg_side: int | None = None
    decoder: Decoder | None = None


WHOLE = Decoding()
"""The image as it lies there."""


def decode(
    source: Path | bytes,
    name: str,
    mode: Mode,
    dataset: str = "",
    decoding: Decoding = WHOLE,
) -> Tensor:
    """uint8 (C, H, W). Raises DatasetError, with the image's name, for what cannot be decoded.

    dataset: what `pipeline check-data` has to be given, for the error's remedy.
    """
    with opened(source, name, dataset) as image:
        if image.mode.startswith(_DEEP):
            raise DatasetError(
                f"image {name} has more than 8 bits a channel",
                f"Convert the images to 8 bits. {left_out(dataset)}",
            )
        if mode == "L" and image.mode not in GREY:
            raise in_colour(name, dataset)
        if decoding.jpeg_side is not None:
            image.draft(None, (decoding.jpeg_side, decoding.jpeg_side))
        image.load()
        if decoding.exif:
            ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # Pillow would warn, and drop it as well
        shown = image if image.mode == mode else image.convert(mode)
        content, (width, height) = bytearray(shown.tobytes()), shown.size
    return torch.frombuffer(content, dtype=torch.uint8).view(height, width, -1).permute(2, 0, 1)


def in_colour(name: str, dataset: str) -> DatasetError:
    """A coloured image among grey ones."""
    return DatasetError(
        f"image {name} is in colour, others of the dataset are grey",
        f"Convert them alike, to grey or to colour. {left_out(dataset)}",
    )


def common_mode(images: Iterable[tuple[Path | bytes, str]]) -> Mode:
    """Grey if all of these (source, name) are, else colour. Only their headers are read; one that
    cannot be read, or has too many bits, is told of when it is decoded.
    """
    modes = set()
    for source, name in images:
        with suppress(DatasetError), opened(source, name) as image:
            if not image.mode.startswith(_DEEP):
                modes.add(image.mode)
    return "L" if modes and modes.issubset(GREY) else "RGB"


def check_command(kind: str, root: str | Path | None = None) -> str:
    """How `pipeline check-data` is given a dataset."""
    return shlex.quote(kind) + ("" if root is None else f" --root {shlex.quote(str(root))}")


@contextmanager
def opened(source: Path | bytes, name: str, dataset: str = "") -> Iterator[Image.Image]:
    """An image being read. Raises DatasetError, naming it, for whatever cannot be read."""
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            yield image
    except DatasetError:
        raise
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise DatasetError(
                f"cannot open image {name}: too many open files",
                "Raise the limit with `ulimit -n 4096`, or use fewer --workers.",
            ) from error
        if error.errno is not None:
            raise DatasetError(
                f"cannot read image {name}: {error.strerror}",
                f"Restore it or allow reading it. {left_out(dataset)}",
            ) from error
        raise _broken(source, name, error, dataset) from error
    except Exception as error:  # damaged images make Pillow raise many kinds
        raise _broken(source, name, error, dataset) from error


def _broken(source: Path | bytes, name: str, error: Exception, dataset: str) -> DatasetError:
    empty = not source if isinstance(source, bytes) else source.stat().st_size == 0
    what = str(error).partition(": ")[0] if isinstance(error, Image.DecompressionBombError) else ""
    if isinstance(error, UnidentifiedImageError):
        what = "it is empty" if empty else "it is no image that Pillow knows"
    what = what or (str(error) or type(error).__name__).splitlines()[0]
    return DatasetError(
        f"cannot read image {name}: {what}", f"Replace the file. {left_out(dataset)}"
    )


def left_out(dataset: str) -> str:
    """How to leave an image out, for the remedy of an error. dataset: as `decode` takes it."""
    if not dataset:
        return "Or leave it out of the dataset."
    return (
        f"Or leave it out: run `pipeline check-data {dataset} --skip-out skip.txt`, then this "
        "command again with --skip skip.txt."
    )
