"""Datasets of Hugging Face's `datasets`, as `save_to_disk` leaves them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stages.errors import DatasetError
from stages.inputs.datasets.compressed import (
    SAMPLED_MODES,
    WHOLE,
    Decoding,
    Mode,
    check_command,
    common_mode,
)
from stages.inputs.datasets.dataset import (
    ImageDataset,
    Source,
    Split,
    dataset,
    digest,
    fixed_sample,
    in_memory,
)
from stages.inputs.datasets.encoded import Encoded
from stages.inputs.datasets.skipping import blackened, skipped_numbers

SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "val")}


@dataclass(frozen=True)
class _StoredImages(Encoded):
    """Decodes the i-th image of a table of compressed ones; travels to workers as it is."""

    table: Any
    column: str
    name: str
    command: str
    mode: Mode = "RGB"
    decoding: Decoding = WHOLE

    def compressed(self, index: int) -> tuple[bytes, str]:
        """The image's bytes as they are stored, and what to call it."""
        name = f"{index} of {self.name}"
        image = self.table[index][self.column]
        if image is None:
            raise DatasetError(f"image {name} is missing", "Filter such rows out.")
        stored, path = image["bytes"], image["path"]
        try:  # save_to_disk brings the files along unless told otherwise
            return (Path(path).read_bytes() if stored is None else stored), name
        except OSError as error:
            raise DatasetError(
                f"cannot read image {name}: {error}", "Save it with embed_external_files=True."
            ) from error

    def stored(self, index: int) -> bytes:
        """The image's bytes as they are stored; none where it cannot be had."""
        try:
            return self.compressed(index)[0]
        except DatasetError:
            return b""


@dataset("hf:")
def hugging_face(source: Source) -> ImageDataset:
    """One split of a DatasetDict. Its images are identified by the stored bytes of a fixed sample.

    Raises DatasetError if there is not exactly one column of images and one of class labels.
    """
    root, split = Path(source.argument).expanduser(), source.split
    try:
        datasets: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        raise DatasetError(
            f"hf:{root} needs the package `datasets`", "pip install 'teacher-cache[hf]'"
        ) from error
    try:
        found = datasets.load_from_disk(str(root))
    except Exception as error:  # pyarrow and json raise many kinds on damaged files
        raise DatasetError(
            f"cannot read {root}: {str(error).splitlines()[0]}",
            "hf:DIR needs what DatasetDict.save_to_disk(DIR) wrote.",
        ) from error
    splits: dict[str, Any] = found if isinstance(found, dict) else {}
    name = next((n for n in SPLITS[split] if n in splits), None)
    if name is None:
        raise DatasetError(
            f"{root} has no split {' or '.join(SPLITS[split])}, only {', '.join(splits) or 'none'}",
            "Save a DatasetDict with the splits train and test, or train and validation.",
        )
    table = splits[name]
    where = f"{root} ({name})"
    image = _column(table, lambda feature: isinstance(feature, datasets.Image), "Image", where)
    label = _column(
        table, lambda feature: isinstance(feature, datasets.ClassLabel), "ClassLabel", where
    )
    labels = table.with_format("numpy", columns=[label])[:][label]  # no image is decoded
    if labels.dtype.kind not in "iu":
        raise DatasetError(f"column '{label}' of {where} has missing labels", "Filter them out.")

    stored = table.select_columns([image]).with_format(None)
    stored = stored.cast_column(image, datasets.Image(decode=False))
    command, size = check_command(f"hf:{root}"), len(table)
    found = skipped_numbers(source.skips, size, where)
    left_out, sampled = {skip.sample for skip in found}, fixed_sample(size)
    images = _StoredImages(stored, image, where, command)
    shown = [i for i in sampled[:SAMPLED_MODES] if i not in left_out]
    mode = common_mode((images.stored(i), "") for i in shown)
    images = _StoredImages(stored, image, where, command, mode, source.decoding)
    load = blackened(images, found, size)
    return ImageDataset(
        "hf",
        split,
        tuple(table.features[label].names),
        torch.from_numpy(labels.astype("int64")),
        load,
        in_memory(load, size, source.feeding),
        digest(part for i in sampled for part in _length_and_bytes(images.stored(i))),
        skips=tuple(found),
        exif=source.exif,
        jpeg_side=source.jpeg_side,
        decoder=source.decoder,
    )


def _length_and_bytes(content: bytes) -> tuple[bytes, bytes]:
    return str(len(content)).encode(), content


def _column(table: Any, wanted: Callable[[Any], bool], kind: str, where: str) -> str:
    names: list[str] = [name for name, feature in table.features.items() if wanted(feature)]
    if len(names) != 1:
        columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in table.features.items())
        raise DatasetError(
            f"{where} has {len(names) or 'no'} columns of type {kind}: {columns}",
            f"Keep exactly one, with select_columns or cast_column(..., {kind}(...)).",
        )
    return names[0]
