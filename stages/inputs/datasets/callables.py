"""Datasets that the user's own code returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from stages.errors import DatasetError, PipelineError
from stages.inputs.datasets.dataset import (
    ImageDataset,
    Source,
    digest,
    fixed_sample,
    in_memory,
    shape_and_bytes,
    without,
)
from stages.inputs.datasets.skipping import blackened, skipped_numbers
from stages.user_code import error_line, imported

MOST_CLASSES = 2**20
READ_TWICE = 8
"""Samples whose pixels are compared with themselves."""
_FORM = (
    "It returns a dataset for 'train' and 'test': len(dataset), and dataset[i] -> (image, label)."
)
Result = TypeVar("Result")


def from_callable(source: Source) -> ImageDataset:
    """The dataset that `module:callable` returns for a split. Raises DatasetError for whatever is
    wrong with it, and for whatever it raises, with the line of its code.
    """
    spec, split = source.spec, source.split
    name = f"dataset '{spec}' ({split})"
    make = asked(f"importing {name}", lambda: imported(spec, "dataset", DatasetError))
    if not callable(make):
        raise DatasetError(f"{name} is a {type(make).__name__}, which cannot be called", _FORM)
    theirs = asked(name, lambda: make(split))
    if not (hasattr(theirs, "__len__") and hasattr(theirs, "__getitem__")):
        raise DatasetError(f"{name} is a {type(theirs).__name__} without length or items", _FORM)
    size = asked(f"len() of {name}", lambda: len(theirs))
    labels = labels_of(theirs, size, name)
    class_names = _class_names(theirs, labels, name)

    found = skipped_numbers(source.skips, size, name)
    left_out = torch.tensor([skip.sample for skip in found], dtype=torch.int64)
    sampled = fixed_sample(size)
    read = MapStyle(theirs, name)
    if shown := without(torch.tensor(sampled, dtype=torch.int64), left_out).tolist():
        read = replace(read, channels=steady(read, shown[:READ_TWICE]))
    load = blackened(read, found, size)
    return ImageDataset(
        spec,
        split,
        class_names,
        labels,
        load,
        in_memory(load, size, source.feeding),
        digest(part for i in sampled for part in identifying(read, i)),
        skips=tuple(found),
    )


def asked(what: str, ask: Callable[[], Result]) -> Result:
    """The result of the user's own code. Raises DatasetError with the error and the line of that
    code if it raises anything.
    """
    try:
        return ask()
    except PipelineError:
        raise
    except (Exception, SystemExit) as error:
        raise DatasetError(
            f"{what} raised {error_line(error)}",
            "Mend that code: `python -c` shows its whole traceback.",
        ) from error


# ---- details --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapStyle:
    """Loads from a map-style dataset of (image, label): PIL image, array (H, W[, C]) or tensor.

    channels: what every image has to have, None for any number.
    """

    source: Any
    name: str
    channels: int | None = None

    def __call__(self, index: int) -> Tensor:
        image = item_of(self.source, index, self.name)[0]
        if isinstance(image, Image) and image.mode not in ("L", "RGB"):
            raise DatasetError(
                f"image {index} of {self.name} is in Pillow's mode {image.mode}",
                "Return image.convert('RGB'), or image.convert('L') for grey.",
            )
        if isinstance(image, Tensor):
            pixels = image.detach().cpu()
        else:
            what = f"image {index} of {self.name}"
            array = asked(what, lambda: np.array(image))
            pixels = _from_array(array, f"{what} is", type(image).__name__)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or not pixels.numel():
            raise DatasetError(
                f"image {index} is {pixels.dtype} of shape {tuple(pixels.shape)}",
                "Return PIL images or uint8 pixels: (C, H, W) tensors or (H, W, C) arrays.",
            )
        if self.channels not in (None, pixels.shape[0]):
            raise DatasetError(
                f"image {index} of {self.name} has {pixels.shape[0]} channel(s), others "
                f"{self.channels}",
                "Convert them alike, to grey or to colour.",
            )
        return pixels


def _from_array(pixels: NDArray[Any], what: str, kind: str) -> Tensor:
    """(H, W[, C]) -> (C, H, W); what is of other dimensions as it is. kind: the object's type."""
    if pixels.dtype.kind not in "biuf" or not pixels.dtype.isnative:
        raise DatasetError(
            f"{what} no image but {kind}",
            "Return PIL images or uint8 pixels: (C, H, W) tensors or (H, W, C) arrays.",
        )
    few = (1, 3)
    if pixels.ndim == 3 and pixels.shape[0] in few and pixels.shape[2] not in (*few, 2, 4):
        raise DatasetError(
            f"{what} an array of shape {pixels.shape}, which seems to have its channels first",
            "Arrays are (H, W, C): transpose it, or return a tensor.",
        )
    tensor = torch.from_numpy(pixels if pixels.ndim != 2 else pixels[..., None])
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor


def item_of(source: Any, index: int, name: str) -> Any:
    """(image, label). Raises DatasetError for anything else."""
    item = asked(f"sample {index} of {name}", lambda: source[index])
    if not isinstance(item, tuple | list) or len(item) < 2:
        kind = type(item).__name__
        size = f" of {len(item)}" if isinstance(item, tuple | list | dict) else ""
        raise DatasetError(f"sample {index} of {name} is a {kind}{size}", _FORM)
    return item


def steady(read: MapStyle, samples: Sequence[int]) -> int:
    """The channels of the first of these. Raises DatasetError if one has other pixels when it is
    read again: what a teacher has seen would be gone.
    """
    for sample in samples:
        if not torch.equal(read(sample), read(sample)):
            raise DatasetError(
                f"sample {sample} of {read.name} has other pixels each time that it is read",
                "Take random transforms out of it: views are drawn by --augment, and by "
                "v2:module:callable with transforms of your own.",
            )
    return int(read(samples[0]).shape[0])


def identifying(read: MapStyle, index: int) -> tuple[bytes, ...]:
    """What identifies an image: its shape and bytes."""
    try:
        return shape_and_bytes(read(index))
    except DatasetError:  # told of when it is shown, if it is not skipped
        return (b"unreadable",)


def labels_of(source: Any, size: int, name: str) -> Tensor:
    """int64 (N,). Raises DatasetError for whatever is not one class number an image."""
    given: Any = asked(f"targets of {name}", lambda: getattr(source, "targets", None))
    if given is None:
        given = [item_of(source, i, name)[1] for i in range(size)]
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    elif not isinstance(given, np.ndarray):
        parts = asked(f"targets of {name}", lambda: list(given))
        given = [part.tolist() if isinstance(part, Tensor | np.ndarray) else part for part in parts]
    try:
        labels = np.asarray(given)
    except ValueError:
        labels = np.empty(0, dtype=object)  # lists of different lengths
    if not len(given):
        return torch.empty(0, dtype=torch.int64)
    _check_kind(labels, name)
    if len(labels) != size:
        raise DatasetError(
            f"{name} has {size} images and {len(labels)} labels",
            "Its `targets` need one label an image.",
        )
    near = np.isfinite(labels) & (np.abs(labels.astype(np.float64)) <= MOST_CLASSES)
    whole = np.where(near, labels, 0).astype(np.int64)
    if not near.all() or not np.array_equal(whole, labels):
        raise DatasetError(
            f"{name} has labels that are no class numbers",
            f"Labels are integers that count from 0, below {MOST_CLASSES:,}.",
        )
    return torch.from_numpy(whole)


def _check_kind(labels: NDArray[Any], name: str) -> None:
    """Raise DatasetError unless there is a number for each image."""
    if labels.dtype.kind in "US" or (
        labels.dtype.kind == "O" and labels.size and isinstance(labels.flat[0], str)
    ):
        raise DatasetError(
            f"{name} has texts as labels, '{labels.flat[0]}'",
            "Return numbers, `classes.index(label)`, and keep the names in its `classes`.",
        )
    if labels.dtype.kind not in "biuf":
        raise DatasetError(
            f"{name} has labels of different kinds or lengths",
            "Every image needs one class number; images of several classes cannot be used.",
        )
    if labels.ndim == 1:
        return
    shape = "x".join(map(str, labels.shape))
    if labels.ndim == 2 and labels.shape[1] == 1:
        remedy = "Return one number an image: `labels[:, 0]`."
    elif labels.ndim == 2 and bool((labels.sum(1) == 1).all()) and bool((labels.max(1) == 1).all()):
        remedy = "They are one-hot: return the class numbers, `labels.argmax(1)`."
    else:
        remedy = "Every image needs one class number; images of several classes cannot be used."
    raise DatasetError(f"{name} has labels of shape {shape}", remedy)


def _class_names(source: Any, labels: Tensor, name: str) -> tuple[str, ...]:
    """Its `classes`, else the numbers. Raises DatasetError for labels that count from 1."""
    least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    classes = asked(f"classes of {name}", lambda: getattr(source, "classes", None))
    if classes is None:
        names = tuple(map(str, range(most + 1)))
    else:
        names = asked(f"classes of {name}", lambda: tuple(map(str, classes)))
    if least == 1 and most == (len(names) if classes is not None else most):
        count = len(names) if classes is not None else most
        raise DatasetError(
            f"{name} has labels from 1 to {most} for {count} classes",
            "Labels count from 0: subtract 1."
            + ("" if classes is not None else " If class 0 has no images here, give it `classes`."),
        )
    return names
