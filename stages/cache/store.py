"""LogitCache: a teacher's logits in a Zarr v3 store, block by block.

    cache = LogitCache.open("cache.zarr")
    targets = cache.read_view(0)            # one view: what a student reads for one epoch
    targets.rows(torch.tensor([7, 3]))      # dataset indices -> float32 (2, C)

Order of writing: all metadata, then a block's shards, then its commit record. A reader never
touches a block without a record: Zarr itself would silently return zeros for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from stages.cache import arrays, layout, root
from stages.cache.commits import CommitLog, Record, describe_objects
from stages.cache.encoding import Encoding, encoding
from stages.cache.identity import Identity, identity_from_json
from stages.cache.layout import BlockGrid
from stages.cache.rectified import Rectification, RectificationSettings
from stages.cache.targets import ViewTargets
from stages.errors import CacheError


@dataclass(frozen=True)
class Block:
    """One block as it was written: its rows in row order.

    logits: float32 (n, C), decoded. labels, predictions: int64 (n,).
    """

    logits: Tensor
    labels: Tensor
    predictions: Tensor


class LogitCache:
    """A store that exists: open it with `open`, make one with `create`."""

    def __init__(self, path: str | Path, group: zarr.Group) -> None:
        self.path = Path(path)
        self._group = group
        attributes = root.read_attributes(self.path, group)
        self.identity: Identity = identity_from_json(attributes.identity, str(path))
        if self.identity.digest() != attributes.identity_digest:
            raise CacheError(f"{path}: the identity does not match its digest")
        self.provenance = attributes.provenance
        self.pixel_probes = attributes.pixel_probes
        self.encoding: Encoding = encoding(attributes.encoding.name, self.num_classes)
        self.commits = CommitLog(group.store, "logits", self.grid.num_blocks)
        self.eval_commits = CommitLog(group.store, "eval", 1)

    # ---- making and opening -------------------------------------------------------------

    @staticmethod
    def open(path: str | Path, writable: bool = False) -> "LogitCache":
        """The cache at `path`. Raises CacheError if there is none, or a newer version."""
        return LogitCache(path, arrays.open_group(Path(path), "r+" if writable else "r"))

    @staticmethod
    def create(
        path: str | Path,
        identity: Identity,
        coding: Encoding,
        num_views: int,
        dataset_index: Tensor,
        labels: Tensor,
        eval_labels: Tensor,
        pixel_probes: Sequence[int],
        provenance: Mapping[str, Any],
        block_rows: int = layout.MAX_BLOCK_ROWS,
    ) -> "LogitCache":
        """Write all metadata of a new cache; the root attributes come last and make it one.

        dataset_index: int64 (N,), the sample of each row. labels: int64 (N,), in dataset order.
        Whatever an interrupted `create` left at `path` is replaced.
        """
        classes = len(identity.dataset.class_names)
        sizes = {
            "view": num_views,
            "sample": len(dataset_index),
            "class": classes,
            "eval_sample": len(eval_labels),
        }
        grid = layout.block_grid(len(dataset_index), classes, block_rows)
        group = root.unfinished_group(Path(path))
        for name, spec in (layout.base_arrays(classes) | coding.arrays()).items():
            arrays.create_array(group, name, spec, sizes, grid)
        for name, values in (
            ("dataset_index", dataset_index),
            ("label", labels[dataset_index]),
            ("eval_label", eval_labels),
        ):
            array = arrays.get_array(group, name)
            array[:] = values.numpy().astype(array.dtype)
        group.create_group("commits")
        group.create_group("rectified")
        group.attrs.put(
            {
                "format": layout.FORMAT,
                "version": layout.VERSION,
                "identity": identity.to_json(),
                "identity_digest": identity.digest(),
                "encoding": {"name": coding.name},
                "provenance": dict(provenance),
                "pixel_probes": list(pixel_probes),
            }
        )
        return LogitCache.open(path, writable=True)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a cache can be opened at `path`; see `root.exists`."""
        return root.exists(Path(path))

    def grow(self, num_views: int) -> None:
        """Make room for more views in every array, rectifications included. Safe to repeat:
        `prediction`, whose length is the number of views, comes last.
        """
        for name in self.rectifications:
            arrays.grow(self.rectification(name).group, num_views)
        arrays.grow(self._group, num_views, last="prediction")

    # ---- what it is ---------------------------------------------------------------------

    @property
    def num_views(self) -> int:
        """How many views it is to hold; `complete_views` says which it does hold."""
        return int(arrays.get_array(self._group, "prediction").shape[0])

    @property
    def num_samples(self) -> int:
        return self.identity.dataset.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.identity.dataset.class_names)

    @property
    def complete_views(self) -> list[int]:
        return [v for v in range(self.num_views) if self.commits.is_complete(v)]

    @cached_property
    def grid(self) -> BlockGrid:
        """The block grid the arrays were created with."""
        array = arrays.get_array(self._group, "prediction")
        if array.shards is None:
            raise CacheError(f"{self.path}: array 'prediction' is not sharded")
        rows, chunk, shard = int(array.shape[1]), int(array.chunks[1]), int(array.shards[1])
        return BlockGrid(rows, chunk, shard // chunk)

    @cached_property
    def dataset_index(self) -> Tensor:
        """int64 (N,): the sample of each row."""
        return arrays.read_array(self._group, "dataset_index")

    @cached_property
    def row_labels(self) -> Tensor:
        """int64 (N,): the label of each row."""
        return arrays.read_array(self._group, "label")

    @cached_property
    def row_of(self) -> Tensor:
        """int64 (N,): the row of each sample."""
        rows = torch.empty_like(self.dataset_index)
        rows[self.dataset_index] = torch.arange(len(rows))
        return rows

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,), in dataset order."""
        return self.row_labels[self.row_of]

    def top1(self, view: int) -> float:
        """The teacher's accuracy on a complete view, in [0, 1]."""
        self._require_view(self.commits, view)
        return float((self._predictions(view) == self.row_labels).double().mean())

    # ---- reading ------------------------------------------------------------------------

    def read_view(self, view: int, rectified: str | None = None) -> ViewTargets:
        """All targets of a view, still encoded. Raises CacheError if it is not complete."""
        self._require_view(self.commits, view)
        values = None
        if rectified is not None:
            rectification = self.rectification(rectified)
            self._require_view(rectification.commits, view)
            values = rectification.read_values(view)
        return ViewTargets(
            encoding=self.encoding,
            arrays=self._encoded(view, slice(None)),
            predictions=self._predictions(view),
            labels=self.row_labels,
            row_of=self.row_of,
            rectified=values,
        )

    def read_block(self, view: int, block: int) -> Block:
        """One committed block, decoded. Raises CacheError if it is not committed."""
        if not self.commits.has(view, block):
            raise CacheError(
                f"{self.path}: block {block} of view {view} is not there",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        self.commits.check_objects(view, block)
        rows = self.grid.rows(block)
        return Block(
            self.encoding.decode(self._encoded(view, rows)),
            self.row_labels[rows],
            self._predictions(view, rows),
        )

    def distribution(
        self, view: int, rectified: str | None = None, temperature: float = 1.0
    ) -> Tensor:
        """softmax(logits / temperature) of every sample: float32 (N, C), in dataset order."""
        if rectified is not None:
            self.rectification(rectified).check_temperature(temperature)
        targets = self.read_view(view, rectified)
        samples = torch.arange(self.num_samples)
        rows = targets.rows(samples) if rectified is None else targets.rectified_rows(samples)
        return torch.softmax(rows / temperature, dim=1)

    def eval_logits(self) -> tuple[Tensor, Tensor]:
        """The teacher's float32 logits (M, C) and the labels int64 (M,) of the test split."""
        if not self.eval_commits.is_complete(0):
            raise CacheError(
                f"{self.path} has no logits of the test split yet",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        self.eval_commits.check_objects(0)
        logits = arrays.read_array(self._group, "eval_logits").float()
        return logits, arrays.read_array(self._group, "eval_label")

    def _predictions(self, view: int, rows: slice = slice(None)) -> Tensor:
        return arrays.read_array(self._group, "prediction", view, rows)

    def _encoded(self, view: int, rows: slice) -> dict[str, Tensor]:
        names = self.encoding.arrays()
        return {name: arrays.read_array(self._group, name, view, rows) for name in names}

    def _require_view(self, commits: CommitLog, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise CacheError(f"{self.path} has views 0 to {self.num_views - 1}, not {view}")
        if not commits.is_complete(view):
            complete = sum(commits.is_complete(v) for v in range(self.num_views))
            stage = "cache-teacher" if commits is self.commits else "rectify"
            raise CacheError(
                f"{self.path}: view {view} of {commits.part} is not complete "
                f"({complete} of {self.num_views} views are)",
                f"Run `pipeline {stage}` again to finish it.",
            )
        commits.check_objects(view)

    # ---- writing ------------------------------------------------------------------------

    def write_block(
        self, view: int, block: int, logits: Tensor, predictions: Tensor, record: Record
    ) -> None:
        """Encode, write and commit a block. logits: float32 (n, C); predictions: int64 (n,)."""
        values = self.encoding.encode(logits) | {"prediction": predictions}
        specs = self.encoding.arrays() | layout.base_arrays(self.num_classes)
        arrays.write_block(
            self._group, self.commits, self.grid, (view, block), values, specs, record
        )
        self.commits.compact(view)

    def write_eval_logits(self, logits: Tensor, record: Record) -> None:
        """The teacher's logits on the test split: float32 (M, C), kept as float16."""
        limit = torch.finfo(torch.float16).max
        halves = logits.clamp(-limit, limit).half()
        arrays.get_array(self._group, "eval_logits")[:] = halves.numpy()
        objects = describe_objects(self._group.store, ["eval_logits/c/0/0"])
        self.eval_commits.commit(0, 0, {**record, "objects": objects})
        self.eval_commits.compact(0)

    # ---- rectifications -----------------------------------------------------------------

    @property
    def rectifications(self) -> list[str]:
        """The names of this cache's rectifications."""
        groups = arrays.subgroup(self._group, "rectified").groups()
        return sorted(name for name, child in groups if child.attrs.asdict())

    def rectification(self, name: str) -> Rectification:
        """An open rectification. Raises CacheError if there is none of this name."""
        names = self.rectifications
        if name not in names:
            raise CacheError(
                f"{self.path} has no rectification '{name}'"
                + (f"; it has {', '.join(names)}" if names else ""),
                f"Make one with `pipeline rectify {self.path}`.",
            )
        group = arrays.subgroup(self._group, f"rectified/{name}")
        return Rectification.open(name, group, self.grid, self.identity.digest())

    def create_rectification(self, name: str, settings: RectificationSettings) -> Rectification:
        """A new rectification, or the one of this name if it has the same settings.

        Raises CacheError if it has others.
        """
        if name not in self.rectifications:
            group = self._group.create_group(f"rectified/{name}", overwrite=True)
            sizes = {"view": self.num_views, "sample": self.num_samples, "class": self.num_classes}
            CommitLog(self._group.store, f"rectified/{name}", self.grid.num_blocks).clear()
            Rectification.create(group, self.grid, sizes, settings, self.identity.digest())
        rectification = self.rectification(name)
        if rectification.settings != settings:
            there = rectification.settings
            raise CacheError(
                f"rectification '{name}' exists with other settings: {there.method}, "
                f"{there.space}, T={there.temperature:g}",
                "Choose another --name.",
            )
        return rectification
