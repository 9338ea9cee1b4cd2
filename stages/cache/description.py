"""What a cache is, by its metadata: identity, encoding, rows and labels."""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
import zarr
from torch import Tensor

from stages.cache import arrays, metadata
from stages.cache.calibrated import Calibrated
from stages.cache.encoding import Encoding, Fidelity, restored
from stages.cache.identity import Identity, SkippedSample, identity_from_json
from stages.cache.layout import ANCHOR, ArraySpec, BlockGrid
from stages.cache.storage import Location
from stages.errors import CacheError


class CacheDescription:
    """The metadata of a cache, compared with what was written.

    They are read once; `look_again` reads what another process may have changed since.
    """

    def __init__(self, path: Location, group: zarr.Group) -> None:
        self.path, self.group = path, group
        attributes = metadata.read_attributes(path, group.attrs.asdict())
        self.identity: Identity = identity_from_json(attributes.identity, str(path))
        self.identity_digest = self.identity.digest()
        if self.identity_digest != attributes.identity_digest:
            raise CacheError(f"{path}: the identity does not match its digest")
        self.provenance = attributes.provenance
        self.pixel_probes = attributes.pixel_probes
        self.fidelity: Fidelity | None = attributes.whole_fidelity
        self.calibrated: Calibrated | None = attributes.calibrated
        self.skips: tuple[SkippedSample, ...] = attributes.skipped
        self.encoding: Encoding = restored(
            attributes.encoding, self.num_classes, lambda name: arrays.read_array(group, name)
        )
        self._array_digests = attributes.shared_arrays
        self.labelled = bool(self.identity.dataset.labels)
        """Whether the samples have labels."""
        self.tested = "eval_label" in self._array_digests
        """Whether there is a test split."""
        if not self.tested and arrays.member(group, "eval_label") is not None:
            raise CacheError(
                f"{path}: there is an array eval_label that the attributes do not name",
                "Run `pipeline verify CACHE --repair`.",
            )
        self.specs: dict[str, ArraySpec] = metadata.all_arrays(
            self.num_classes, self.encoding, self.labelled, self.tested
        )
        self.look_again()
        if faults := self.document_faults():
            raise CacheError(f"{path}: {faults[0]}", "Run `pipeline verify CACHE --repair`.")

    def look_again(self) -> None:
        """Read again how many views the arrays have room for."""
        self.num_views = int(arrays.get_array(self.group, "prediction").shape[0])
        """How many views it is to hold; `complete_views` says which it does hold."""

    # ---- sizes and documents ------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """N, the samples of the training split."""
        return self.identity.dataset.num_samples

    @property
    def num_classes(self) -> int:
        """C, the classes of the dataset."""
        return len(self.identity.dataset.class_names)

    @cached_property
    def grid(self) -> BlockGrid:
        """The block grid the arrays were created with."""
        array = arrays.get_array(self.group, "prediction")
        if array.shards is None or array.ndim != 2:
            raise CacheError(f"{self.path}: array 'prediction' is not sharded by view and sample")
        rows, chunk, shard = int(array.shape[1]), int(array.chunks[1]), int(array.shards[1])
        return BlockGrid(rows, chunk, max(1, shard // chunk))

    @property
    def sizes(self) -> dict[str, int]:
        """The length of every dimension."""
        return {
            "view": self.num_views,
            "sample": self.num_samples,
            "class": self.num_classes,
            "eval_sample": self._eval_samples,
            **self.encoding.sizes,
        }

    @property
    def _eval_samples(self) -> int:
        return int(arrays.get_array(self.group, "eval_label").shape[0]) if self.tested else 0

    @property
    def row_bytes(self) -> int:
        """What one row of a view takes in memory once it is read, a rectification included, and
        what it is coded beside; without what all views share.
        """
        by_block = [name for name, spec in self.specs.items() if spec.by_block]
        of_view = [[n for n in by_block if self.specs[n].of_view(v)] for v in (ANCHOR, ANCHOR + 1)]
        values = max(self._held_bytes(names) for names in of_view)
        return values + 2 * torch.float32.itemsize + self.anchor_row_bytes

    @property
    def anchor_row_bytes(self) -> int:
        """How much of `row_bytes` views have in common that are read together."""
        return self._held_bytes(self.encoding.of_anchor.values())

    def _held_bytes(self, names: Iterable[str]) -> int:
        """What one row of these arrays takes in memory."""
        sizes = {**self.encoding.sizes, "class": self.num_classes, "view": 1, "sample": 1}
        specs = [self.specs[name] for name in names]
        return sum(
            math.prod(spec.shape(sizes)) * arrays.held_dtype(spec.dtype).itemsize for spec in specs
        )

    def document_faults(self) -> list[str]:
        """What is wrong with the metadata of the root's arrays."""
        return arrays.array_faults(self.group, self.specs, self.sizes, self.grid)

    @property
    def calibration(self) -> float:
        """The temperature that logits are divided by so that the teacher is calibrated.

        Raises CacheError where none was fitted.
        """
        if self.calibrated is None:
            raise CacheError(
                f"{self.path} is not calibrated", f"Run `pipeline calibrate {self.path}` first."
            )
        return self.calibrated.temperature

    # ---- rows ---------------------------------------------------------------------------

    @cached_property
    def dataset_index(self) -> Tensor:
        """int64 (N,): the sample of each row."""
        return self._whole("dataset_index")

    @cached_property
    def row_of(self) -> Tensor:
        """int64 (N,): the row of each sample."""
        rows = torch.empty_like(self.dataset_index)
        rows[self.dataset_index] = torch.arange(len(rows))
        return rows

    @cached_property
    def row_labels(self) -> Tensor:
        """int64 (N,): the label of each row; -1 where there are none."""
        return self._whole("label") if self.labelled else torch.full((self.num_samples,), -1)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,), in dataset order."""
        return self.row_labels[self.row_of]

    @cached_property
    def eval_labels(self) -> Tensor:
        """int64 (M,): the labels of the test split; empty where there is none."""
        return self._whole("eval_label") if self.tested else torch.empty(0, dtype=torch.int64)

    def require_labels(self, what: str) -> None:
        """Raise CacheError where the samples have no labels. what: which needs them."""
        if not self.labelled:
            raise CacheError(
                f"{what} needs labels, and the training images of {self.path} have none",
                "Leave it out; a loss against the teacher alone, such as kd, needs none.",
            )

    def _whole(self, name: str) -> Tensor:
        """An array that is written once. Raises CacheError unless it is what was written."""
        values = arrays.read_array(self.group, name)
        if arrays.array_digest(name, self.specs[name], values) != self._array_digests.get(name):
            raise CacheError(
                f"{self.path}: array '{name}' is damaged: its values are not those written",
                "Run `pipeline verify CACHE --repair`.",
            )
        return values

    # ---- samples that are left out ------------------------------------------------------

    def skipped(self, split: str = "train") -> Tensor:
        """int64, ascending: the samples of a split that are left out."""
        return torch.tensor([s.sample for s in self.skips if s.split == split], dtype=torch.int64)

    @property
    def eval_shown(self) -> Tensor:
        """int64, ascending: the samples of the test split without those left out."""
        every = torch.arange(self.sizes["eval_sample"])
        return every[~torch.isin(every, self.skipped("test"))]

    def skipped_rows(self, block: int, record: dict[str, Any]) -> Tensor:
        """bool (n,): the rows of a block that were written without the teacher having seen their
        samples, as its record has them.
        """
        samples = self.dataset_index[self.grid.rows(block)]
        return torch.isin(samples, torch.tensor(record.get("skipped", []), dtype=torch.int64))
