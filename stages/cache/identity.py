"""What makes a cache what it is, and how two identities differ.

Compared field by field whenever a cache is opened for training or resumed. Device, batch size and
library versions are provenance: they are recorded beside the identity and never compared.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from stages.errors import CacheError
from stages.settings import Decoder


class FoldsIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Several teachers, each trained without one fold of the samples: see `stages.folds`.

    map: digest of the fold of every sample. weights: digests of the state dicts, fold after fold.
    """

    count: int
    seed: int
    map: str
    weights: tuple[str, ...]


class TeacherIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """architecture: name of the model. weights: digest of its state dict. mean, std: one number a
    channel. image_size: side of its input in pixels, None for the images' own size.

    outputs: what the model returns; of probabilities the log was taken. class_order: which of its
    outputs each class of the dataset is. pooled_outputs: which outputs were pooled by logsumexp for
    each class, where one has several. folds: of several teachers, each for the samples that it has
    not seen; weights is then a digest of theirs. These four are left out where they have their
    default.
    """

    architecture: str
    weights: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None
    outputs: str = "logits"
    class_order: tuple[int, ...] = ()
    pooled_outputs: tuple[tuple[int, ...], ...] = ()
    folds: FoldsIdentity | None = None


class DatasetIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The training split: its size, its classes in order, digests of labels and images; that of
    labels is empty where there are none.

    exif: images are turned as their EXIF orientation says. jpeg_side: JPEGs are decoded at a part
    of their size as long as both sides keep this many pixels. tested_share: of the images that the
    digest is of, the share that is the test split. decoder: what decodes JPEGs in Pillow's place.
    These four are left out where they are the default.
    """

    name: str
    split: str
    num_samples: int
    class_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    labels: str
    images: str
    exif: bool = False
    jpeg_side: int | None = None
    tested_share: float | None = None
    decoder: Decoder | None = None


class SkippedSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A sample of one split that is left out: its number, and its file's relative path and size
    if the dataset has files. Not part of the identity: samples may be added to an unfinished cache.
    """

    split: str
    sample: int
    path: str | None = None
    bytes: int | None = None


class ViewsIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The view policy: name, parameters, version of its code, seed."""

    policy: str
    parameters: dict[str, int | float | str]
    version: int
    seed: int


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides which numbers a cache holds."""

    teacher: TeacherIdentity
    dataset: DatasetIdentity
    views: ViewsIdentity
    compute_dtype: str

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The identity as plain JSON values, as it lies in the store's attributes."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def identity_from_json(values: Any, where: str) -> Identity:
    """The identity in a store's attributes. Raises CacheError if it is not one."""
    try:
        return msgspec.convert(values, Identity)
    except msgspec.ValidationError as error:
        raise CacheError(f"the identity of {where} is not readable: {error}") from error


def differences(ours: Any, theirs: Any) -> list[str]:
    """The fields in which two structs or mappings differ, as lines `teacher.weights: a, not b`."""
    mine, other = msgspec.to_builtins(ours), msgspec.to_builtins(theirs)
    return list(_differences(mine, other, ""))


def _differences(mine: Any, other: Any, path: str) -> list[str]:
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        return [
            line
            for key in sorted({*mine, *other})
            for line in _differences(mine.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    if mine == other:
        return []
    return [f"{path}: {_short(mine)}, not {_short(other)}"]


def _short(value: Any) -> str:
    text = str(value) or "none"
    return text if len(text) <= 40 else f"{text[:24]}...({len(text)} characters)"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of a state dict: sorted names, dtypes, shapes and bytes, whatever file they lay in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\t{tensor.dtype}\t{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
