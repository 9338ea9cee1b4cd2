"""The encoding of a store that exists, from its attributes and its calibration."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache.encoding.base import Encoding
from stages.cache.encoding.choose import ENCODINGS
from stages.cache.encoding.klt import Klt
from stages.cache.encoding.topk import TopK
from stages.errors import CacheError, PipelineError


class EncodingAttributes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rows are stored, as the root attributes say. digest: as `Encoding.digest`."""

    name: str
    parameters: dict[str, Any]
    digest: str


def encoding_attributes(coding: Encoding) -> dict[str, Any]:
    """The root attribute `encoding`."""
    attributes = EncodingAttributes(coding.name, coding.parameters, coding.digest())
    plain: dict[str, Any] = msgspec.to_builtins(attributes)
    return plain


def restored(
    attributes: EncodingAttributes, num_classes: int, read: Callable[[str], Tensor]
) -> Encoding:
    """The encoding that a store was written with. read: name of a calibration array -> values.

    Raises CacheError if it is unknown, or not what its digest says.
    """
    if attributes.name not in ENCODINGS:
        raise CacheError(
            f"unknown encoding '{attributes.name}'",
            "Install the version of teacher-cache that wrote it, or a newer one.",
        )
    try:
        coding = _made(attributes, num_classes, read)
    except PipelineError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CacheError(f"the encoding's parameters are damaged: {error}") from error
    if coding.digest() != attributes.digest or coding.parameters != attributes.parameters:
        raise CacheError(
            f"the calibration of the encoding {coding.name} is not the one it was made with",
            "Run `pipeline verify CACHE --repair`.",
        )
    return coding


def _made(
    attributes: EncodingAttributes, num_classes: int, read: Callable[[str], Tensor]
) -> Encoding:
    parameters: Mapping[str, Any] = attributes.parameters
    if attributes.name == "klt":
        basis, mean, step = (read(f"klt_{n}") for n in ("basis", "mean", "step"))
        shapes = (tuple(t.shape) for t in (basis, mean, step))
        if tuple(shapes) != ((num_classes, num_classes), (num_classes,), (num_classes,)):
            raise ValueError("calibration of another shape")
        if any(t.dtype != torch.float32 for t in (basis, mean, step)):
            raise ValueError("calibration of another dtype")
        return Klt(basis, mean, step, str(parameters["dtype"]))
    if attributes.name == "topk":
        temperatures = tuple(float(t) for t in parameters["temperatures"])
        return TopK(num_classes, int(parameters["k"]), temperatures)
    return ENCODINGS[attributes.name]()
