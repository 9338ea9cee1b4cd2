"""JPEGs decoded on a GPU by nvJPEG, through torchvision: other pixels than Pillow's.

All but `_decoded` runs without a GPU. Decoded pixels come back to the host, where views are
rendered as those of any image.
"""

import functools
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import Mode, in_colour, left_out

_COLOURS = {1: "grey", 3: "colour"}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""Markers that nothing belongs to."""
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of a frame's header, which says how many colours an image has."""


def check_usable() -> None:
    """Raise DatasetError where this machine, or its torchvision, cannot decode on a GPU."""
    if reason := _unusable():
        raise DatasetError(
            f"--decoder nvjpeg needs a GPU: {reason}",
            "Use a machine with one. Without --decoder Pillow decodes on the CPU.",
        )


def decode_all(
    sources: Sequence[tuple[Path | bytes, str]], mode: Mode, dataset: str = ""
) -> list[Tensor]:
    """uint8 (C, H, W) each, on the CPU, channels last in memory. Raises DatasetError, with the
    image's name, for one that cannot be decoded.

    sources: a file or its bytes, and what to call it. dataset: as `compressed.decode` takes it.
    """
    contents = [_content(source, name, mode, dataset) for source, name in sources]
    try:
        images = _decoded(contents, mode)
    except RuntimeError as error:
        raise _broken(contents, [name for _, name in sources], mode, dataset, error) from error
    return [image.permute(1, 2, 0).contiguous().cpu().permute(2, 0, 1) for image in images]


def colours(content: bytes) -> int:
    """How many components a JPEG has (1 grey, 3 colour, 4 CMYK); 0 for what is no JPEG."""
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAMES:
            return content[at + 9]
        if marker in _WITHOUT_LENGTH:
            at += 2
        elif marker == 0xFF:  # filled up
            at += 1
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return 0


# ---- details --------------------------------------------------------------------------------


def _decoded(contents: Sequence[Tensor], mode: Mode) -> list[Tensor]:
    """uint8 (C, H, W) each, on the GPU that is current. Raises RuntimeError."""
    from torchvision.io import ImageReadMode, decode_jpeg

    chosen = ImageReadMode.GRAY if mode == "L" else ImageReadMode.RGB
    gpu = torch.device("cuda", torch.cuda.current_device())
    return list(decode_jpeg(list(contents), chosen, device=gpu))


@functools.cache
def _unusable() -> str:
    """Why nothing can be decoded; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    content = BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        _decoded([_bytes(content.getvalue())], "RGB")
    except RuntimeError as error:  # such as a torchvision that was built without nvJPEG
        return _first_line(error)
    return ""


def _content(source: Path | bytes, name: str, mode: Mode, dataset: str) -> Tensor:
    """The bytes of a JPEG as a tensor. Raises DatasetError for anything else."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"cannot read image {name}: {error.strerror}",
            f"Restore it or allow reading it. {left_out(dataset)}",
        ) from error
    found = colours(content)
    if found not in _COLOURS:
        kind = "no JPEG" if found == 0 else f"a JPEG of {found} colours (CMYK)"
        raise DatasetError(
            f"image {name} is {kind}, which --decoder nvjpeg does not decode",
            f"Convert it, or leave --decoder out. {left_out(dataset)}",
        )
    if mode == "L" and found != 1:
        raise in_colour(name, dataset)
    return _bytes(content)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _broken(
    contents: Sequence[Tensor],
    names: Sequence[str],
    mode: Mode,
    dataset: str,
    error: RuntimeError,
) -> DatasetError:
    """Which image it was: the first that cannot be decoded alone either."""
    for content, name in zip(contents, names, strict=True):
        try:
            _decoded([content], mode)
        except RuntimeError as own:
            return DatasetError(
                f"cannot read image {name}: {_first_line(own)}",
                f"Replace the file. {left_out(dataset)}",
            )
    return DatasetError(
        f"{len(contents)} images cannot be decoded at a time: {_first_line(error)}",
        "Use a smaller batch size, or fewer --workers.",
    )


def _first_line(error: RuntimeError) -> str:
    """What went wrong, in one short line."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]
