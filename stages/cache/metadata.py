"""The root attributes of a store, and how one is created.

Attributes carry a digest of themselves, which is compared when a cache is opened and when it is
verified.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zarr
from torch import Tensor

from stages.cache import layout
from stages.cache.arrays import array_digest, create_array, open_group
from stages.cache.calibrated import Calibrated
from stages.cache.encoding import Encoding, EncodingAttributes, Fidelity, encoding_attributes
from stages.cache.identity import Identity, SkippedSample
from stages.cache.layout import ArraySpec
from stages.cache.records import seal_records, unsealed
from stages.cache.storage import (
    Location,
    ask,
    first_entry,
    folders,
    open_store,
    read_object,
    remove_half_written,
    write_object,
)
from stages.cache.stores import readable
from stages.errors import CacheError
from stages.settings import MAX_BLOCK_ROWS

UNFINISHED = {"format": layout.FORMAT, "unfinished": True}
"""The root attributes of a cache that is being created."""
COPY = "commits/attributes.json"
"""The root attributes once more: all else can be computed again, provenance cannot."""


class RootAttributes(msgspec.Struct, frozen=True):
    """The root attributes of a cache, as JSON has them."""

    identity: dict[str, Any]
    identity_digest: str
    encoding: EncodingAttributes
    shared_arrays: dict[str, str]
    provenance: dict[str, Any]
    pixel_probes: list[int]
    fidelity: Fidelity | None = None
    skipped: tuple[SkippedSample, ...] = ()
    top5_agreement: float | None = None
    calibrated: Calibrated | None = None

    @property
    def whole_fidelity(self) -> Fidelity | None:
        """`fidelity`, with what stands beside it."""
        if self.fidelity is None:
            return None
        return msgspec.structs.replace(self.fidelity, top5_agreement=self.top5_agreement)


def exists(where: Location) -> bool:
    """Whether a finished root lies there: not in an empty folder, nor in what an interrupted
    creation left. Raises CacheError if something else lies there, or a cache without its root.
    """
    if isinstance(where, Path):
        with readable(where):
            if not where.exists():
                return False
            if not where.is_dir():
                raise CacheError(
                    f"{where} is not a teacher-logit cache: it is a file",
                    "Choose a folder that is empty, or not there.",
                )
    store = open_store(where, read_only=True)
    if read_object(store, "zarr.json") is None:
        if read_object(store, COPY) is not None:
            raise CacheError(
                f"{where} is a cache without its root document zarr.json",
                f"Run `pipeline verify {where} --repair`.",
            )
        if there := first_entry(store):
            raise CacheError(
                f"{where} is not a teacher-logit cache: it holds {there}",
                "Choose a folder or a prefix with nothing in it.",
            )
        return False
    return open_group(where).attrs.asdict() != UNFINISHED


def unfinished_group(where: Location) -> zarr.Group:
    """An empty root group, marked as unfinished; replaces one that is so marked.

    The mark goes down first and stays until the attributes replace it, and only what has a name of
    ours is removed.
    """
    if exists(where):
        raise CacheError(f"there is a cache at {where} already", "Choose another path.")
    store = open_store(where, read_only=False)
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
        remove_half_written(where)
    if read_object(store, "zarr.json") is None:
        # A copy: zarr keeps the dict and changes it with the attributes.
        return zarr.create_group(store, zarr_format=3, attributes=dict(UNFINISHED))
    for name in folders(store, ""):
        if name in layout.FOLDERS:
            ask(store, store.delete_dir(name))
    return open_group(where, writable=True)


def write_attributes(group: zarr.Group, attributes: Mapping[str, Any]) -> None:
    """Seal and write the root attributes, their copy first."""
    whole = sealed(attributes)
    write_object(group.store, COPY, seal_records([whole]))
    group.attrs.put(whole)


def copied_attributes(where: Location) -> dict[str, Any] | None:
    """The root attributes as their copy has them; None if that is missing or damaged."""
    with contextlib.suppress(ValueError, FileNotFoundError, NotADirectoryError):
        content = read_object(open_store(where, read_only=True), COPY)
        if content is not None:
            (attributes,) = unsealed(content)
            return attributes
    return None


def restore_attributes(where: Location, attributes: dict[str, Any]) -> None:
    """Write the root document again, as `write_attributes` does: the digest last."""
    digest = {"digest": attributes["digest"]} if "digest" in attributes else {}
    ordered = {name: attributes[name] for name in sorted(attributes) if name != "digest"} | digest
    store = open_store(where, read_only=False)
    ask(store, store.delete("zarr.json"))
    zarr.create_group(store, zarr_format=3, attributes=ordered)


def read_attributes(where: Location, attributes: Mapping[str, Any]) -> RootAttributes:
    """The root attributes. Raises CacheError for another format, a newer version, or damage."""
    if attributes == UNFINISHED:
        raise CacheError(
            f"{where} was never finished being created", "Run `pipeline cache-teacher` again."
        )
    if attributes.get("format") != layout.FORMAT:
        raise CacheError(
            f"{where} is not a teacher-logit cache",
            "Give what `pipeline cache-teacher --out` made.",
        )
    version = attributes.get("version")
    if version != layout.VERSION:
        raise CacheError(
            f"{where} has format version {version}; this program reads {layout.VERSION}",
            "Install the version of teacher-cache that wrote it, or a newer one.",
        )
    check_seal(attributes, str(where))
    try:
        return msgspec.convert(attributes, RootAttributes)
    except msgspec.ValidationError as error:
        raise CacheError(f"the attributes of {where} are damaged: {error}") from error


def all_arrays(
    num_classes: int, coding: Encoding, labelled: bool = True, tested: bool = True
) -> dict[str, ArraySpec]:
    """Every array at the root of a cache with this encoding. labelled: the training images have
    labels; tested: there is a test split.
    """
    base = layout.base_arrays(num_classes, labelled, tested)
    return base | coding.arrays() | coding.calibration_arrays()


@dataclass(frozen=True)
class NewCache:
    """What a cache is made of, before its first block.

    dataset_index: int64 (N,), the sample of each row. labels: int64 (N,), in dataset order.
    eval_labels: int64 (M,), empty without a test split. provenance: plain JSON values. Without
    labels, as the identity says, `labels` are not kept.
    """

    identity: Identity
    coding: Encoding
    num_views: int
    dataset_index: Tensor
    labels: Tensor
    eval_labels: Tensor
    pixel_probes: Sequence[int] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    block_rows: int = MAX_BLOCK_ROWS

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """Every array at its root."""
        known = self.identity.dataset
        tested = len(self.eval_labels) > 0
        return all_arrays(len(known.class_names), self.coding, bool(known.labels), tested)


def create_store(where: Location, new: NewCache) -> None:
    """Documents and whole arrays of a new cache; the root attributes come last and make it one.

    Whatever an interrupted creation left there is replaced.
    """
    classes, samples = len(new.identity.dataset.class_names), len(new.dataset_index)
    sizes = {
        "view": new.num_views,
        "sample": samples,
        "class": classes,
        "eval_sample": len(new.eval_labels),
        **new.coding.sizes,
    }
    whole = {
        "dataset_index": new.dataset_index,
        "label": new.labels[new.dataset_index],
        "eval_label": new.eval_labels,
    }
    specs = new.arrays
    whole = {name: values for name, values in whole.items() if name in specs}
    grid = layout.block_grid(samples, classes, new.block_rows)
    group = unfinished_group(where)
    created = {name: create_array(group, name, spec, sizes, grid) for name, spec in specs.items()}
    for name, values in (whole | new.coding.calibration()).items():
        created[name][...] = values.numpy().astype(created[name].dtype)
    group.create_group("commits")
    group.create_group("rectified")
    write_attributes(
        group,
        {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "identity": new.identity.to_json(),
            "identity_digest": new.identity.digest(),
            "encoding": encoding_attributes(new.coding),
            "shared_arrays": {n: array_digest(n, specs[n], whole[n]) for n in whole},
            "provenance": dict(new.provenance),
            "pixel_probes": list(new.pixel_probes),
        },
    )


# ---- documents ------------------------------------------------------------------------------


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, sorted, with a digest of all others."""
    bare = {name: value for name, value in attributes.items() if name != "digest"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return {**json.loads(text), "digest": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(attributes: Mapping[str, Any], where: str) -> None:
    """Raise CacheError unless the attributes are what they were when they were sealed."""
    if sealed(attributes) != dict(attributes):
        raise CacheError(
            f"the attributes of {where} are damaged: their digest is another",
            "Run `pipeline verify CACHE --repair`.",
        )
