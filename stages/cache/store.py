"""LogitCache: a teacher's logits in a Zarr v3 store, block by block.

    cache = LogitCache.open("cache.zarr")
    targets = cache.read_view(0)            # one view: what a student reads for one epoch
    targets.rows(torch.tensor([7, 3]))      # dataset indices -> float32 (2, C)

Order of writing: all metadata, then a block's shards, then its commit record. A reader never
touches a block without a record: Zarr itself would silently return zeros for it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
import zarr
from torch import Tensor

from stages.cache import arrays, layout, metadata
from stages.cache.blocks import BlockGroup
from stages.cache.commits import CommitLog, Record
from stages.cache.encoding import (
    Encoding,
    Fidelity,
    checked_rows,
    combined,
    compare,
    restored,
)
from stages.cache.identity import Identity, SkippedSample, identity_from_json
from stages.cache.layout import BlockGrid, BlockId
from stages.cache.metadata import all_arrays, array_fault, create_store
from stages.cache.rectified import Rectification, RectificationSettings
from stages.cache.storage import Location, entries, folders, location, write_object
from stages.cache.stores import checked, described
from stages.cache.targets import ViewTargets
from stages.cache.witnesses import Claim, known_views
from stages.errors import CacheError
from stages.settings import MAX_BLOCK_ROWS


@dataclass(frozen=True)
class Block:
    """One block as it was written: its rows in row order.

    logits: float32 (n, C), decoded. labels, predictions: int64 (n,).
    """

    logits: Tensor
    labels: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class EncodedBlock:
    """As `Block`, still encoded. arrays: what the encoding stored, each (n, ...)."""

    encoding: Encoding
    arrays: Mapping[str, Tensor]
    labels: Tensor
    predictions: Tensor

    def logits(self, temperature: float, rows: Tensor | None = None) -> Tensor:
        """float32 (m, C), decoded as `Encoding.decode` says. rows: int64 (m,), None for all.

        A row decoded among others may differ in its last bit: matrix products round as they like.
        """
        some = {n: x if rows is None else x[rows] for n, x in self.arrays.items()}
        return self.encoding.decode(some, temperature)


_MAX_SATURATED = 0.01


class LogitCache:
    """A store that exists: open it with `open`, make one with `create`."""

    def __init__(self, path: Location, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        attributes = metadata.read_attributes(path, group.attrs.asdict())
        self.identity: Identity = identity_from_json(attributes.identity, str(path))
        if self.identity.digest() != attributes.identity_digest:
            raise CacheError(f"{path}: the identity does not match its digest")
        self.provenance = attributes.provenance
        self.pixel_probes = attributes.pixel_probes
        self.skips: tuple[SkippedSample, ...] = attributes.skipped
        self.encoding: Encoding = restored(
            attributes.encoding, self.num_classes, lambda name: arrays.read_array(group, name)
        )
        self._array_digests = attributes.shared_arrays
        if faults := self.document_faults():
            raise CacheError(f"{path}: {faults[0]}", "Run `pipeline verify CACHE --repair`.")
        digest = attributes.identity_digest
        self.commits = CommitLog(group.store, "logits", self.grid.num_blocks, digest)
        specs = all_arrays(self.num_classes, self.encoding).items()
        by_block = {name: spec for name, spec in specs if spec.by_block}
        self.blocks = BlockGroup(group, self.commits, self.grid, by_block)
        self.eval_commits = CommitLog(group.store, "eval", 1, digest)
        self.fidelity = self._of_all_views(attributes.fidelity)

    # ---- making and opening -------------------------------------------------------------

    @staticmethod
    def open(path: str | Path, writable: bool = False, check: bool = True) -> "LogitCache":
        """The cache at `path`. Raises CacheError if there is none, or a newer version, or if what
        is read here is not what was written: attributes, documents, and the arrays that all views
        share. check: False leaves these arrays until they are used.
        """
        where = location(path)
        cache = LogitCache(where, arrays.open_group(where, writable))
        if check:
            _ = cache.dataset_index, cache.row_labels, cache.eval_labels
        return cache

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
        block_rows: int = MAX_BLOCK_ROWS,
    ) -> "LogitCache":
        """Write all metadata of a new cache; the root attributes come last and make it one.

        dataset_index: int64 (N,), the sample of each row. labels: int64 (N,), in dataset order.
        Whatever an interrupted `create` left at `path` is replaced.
        """
        create_store(
            location(path),
            identity,
            coding,
            num_views,
            {
                "dataset_index": dataset_index,
                "label": labels[dataset_index],
                "eval_label": eval_labels,
                **coding.calibration(),
            },
            {"provenance": dict(provenance), "pixel_probes": list(pixel_probes)},
            block_rows,
        )
        return LogitCache.open(path, writable=True)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a cache can be opened at `path`; see `metadata.exists`."""
        return metadata.exists(location(path))

    def grow(self, num_views: int) -> None:
        """Make room for more views in every array, rectifications included. Safe to repeat:
        `prediction`, whose length is the number of views, comes last.
        """
        for name in self.rectifications:
            arrays.grow(self.rectification(name).group, num_views)
        arrays.grow(self._group, num_views, last="prediction")

    def add_skips(self, skips: Iterable[SkippedSample]) -> None:
        """Leave out more samples. Those that are left out stay so."""
        known = {(skip.split, skip.sample) for skip in self.skips}
        more = [skip for skip in skips if (skip.split, skip.sample) not in known]
        if more:
            self.skips = tuple(sorted([*self.skips, *more]))
            attributes = self._group.attrs.asdict()
            skipped = msgspec.to_builtins(self.skips)
            metadata.write_attributes(self._group, {**attributes, "skipped": skipped})

    # ---- what it is ---------------------------------------------------------------------

    def skipped(self, split: str = "train") -> Tensor:
        """int64, ascending: the samples of a split that nobody is shown."""
        return torch.tensor([s.sample for s in self.skips if s.split == split], dtype=torch.int64)

    @property
    def eval_shown(self) -> Tensor:
        """int64, ascending: the samples of the test split but for those that nobody is shown."""
        every = torch.arange(self.sizes["eval_sample"])
        return every[~torch.isin(every, self.skipped("test"))]

    def skipped_rows(self, block: int, record: Record) -> Tensor:
        """bool (n,): the rows of a block that were written without the teacher having seen their
        samples, as its record has them.
        """
        samples = self.dataset_index[self.grid.rows(block)]
        return torch.isin(samples, torch.tensor(record.get("skipped", []), dtype=torch.int64))

    @property
    def num_views(self) -> int:
        """How many views it is to hold; `complete_views` says which it does hold."""
        return int(arrays.get_array(self._group, "prediction").shape[0])

    @property
    def known_views(self) -> Claim:
        """How many views anything in the cache knows of: more than `num_views` where the arrays
        have been damaged.
        """
        by_block = list(self.blocks.specs)
        return known_views(self._group.store, by_block, self.num_samples, self.provenance)

    @property
    def num_samples(self) -> int:
        return self.identity.dataset.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.identity.dataset.class_names)

    @property
    def complete_views(self) -> list[int]:
        """In order; by name, so that a damaged record shows when its view is read.

        Raises CacheError where views are committed for which the arrays have no room.
        """
        self._check_room()
        return self.commits.complete(self.num_views)

    def _check_room(self) -> None:
        last = max(self.commits.views, default=-1)
        if last >= self.num_views:
            raise CacheError(
                f"{self.path}: view {last} is committed, the arrays have {self.num_views}",
                "Run `pipeline verify CACHE --repair`.",
            )

    @cached_property
    def grid(self) -> BlockGrid:
        """The block grid the arrays were created with."""
        array = arrays.get_array(self._group, "prediction")
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
            "eval_sample": int(arrays.get_array(self._group, "eval_label").shape[0]),
            **self.encoding.sizes,
        }

    def document_faults(self) -> list[str]:
        """What is wrong with the metadata of the root's arrays."""
        specs = all_arrays(self.num_classes, self.encoding)
        sizes, grid = self.sizes, self.grid
        faults = (array_fault(self._group, n, spec, sizes, grid) for n, spec in specs.items())
        return [fault for fault in faults if fault is not None]

    @cached_property
    def dataset_index(self) -> Tensor:
        """int64 (N,): the sample of each row."""
        return self._whole("dataset_index")

    @cached_property
    def row_labels(self) -> Tensor:
        """int64 (N,): the label of each row."""
        return self._whole("label")

    @cached_property
    def eval_labels(self) -> Tensor:
        """int64 (M,): the labels of the test split."""
        return self._whole("eval_label")

    def _whole(self, name: str) -> Tensor:
        """An array that is written once. Raises CacheError unless it is what was written."""
        values = arrays.read_array(self._group, name)
        spec = layout.base_arrays(self.num_classes)[name]
        if arrays.array_digest(name, spec, values) != self._array_digests.get(name):
            raise CacheError(
                f"{self.path}: array '{name}' is damaged: its values are not those written",
                "Run `pipeline verify CACHE --repair`.",
            )
        return values

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
        """The teacher's accuracy on a complete view, in [0, 1], over the rows that it has seen."""
        right = self.predictions(view) == self.row_labels
        records = self.commits.of_view(view)
        blocks = range(self.grid.num_blocks)
        unseen = torch.cat([self.skipped_rows(block, records[block]) for block in blocks])
        return float(right[~unseen].double().mean())

    @property
    def top1_per_view(self) -> dict[int, float]:
        """As `top1`, of every complete view; from the records of its blocks, without any array."""
        return {
            view: sum(int(record["right"]) for record in records.values())
            / (self.num_samples - sum(len(r.get("skipped", ())) for r in records.values()))
            for view, records in self.commits.each_view(self.complete_views)
        }

    def predictions(self, view: int, rows: slice | None = None) -> Tensor:
        """int64 (n,): the teacher's argmax on a complete view, taken before any encoding; of a run
        of rows, None for all.
        """
        self._require_view(self.commits, view)
        runs = [rows or slice(0, self.num_samples)]
        return self.blocks.read(["prediction"], view, runs)["prediction"].long()

    # ---- reading ------------------------------------------------------------------------

    def read_view(
        self, view: int, rectified: str | None = None, runs: Sequence[slice] | None = None
    ) -> ViewTargets:
        """The targets of a view, still encoded; of all its rows, or of some runs of them.

        runs: rows in `dataset_index`, disjoint; whole chunks of `grid` are read without waste.
        Raises CacheError if the view is not complete.
        """
        self._require_view(self.commits, view)
        labels, row_of = self.row_labels, self.row_of
        if runs is not None:
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            labels, row_of = labels[rows], torch.full_like(row_of, len(rows))
            row_of[self.dataset_index[rows]] = torch.arange(len(rows))
        runs = [slice(0, self.num_samples)] if runs is None else runs
        values = None
        if rectified is not None:
            rectification = self.rectification(rectified)
            self._require_view(rectification.commits, view)
            values = rectification.read_values(view, runs)
        read = self.blocks.read(self.blocks.specs, view, runs)
        return ViewTargets(
            encoding=self.encoding,
            predictions=read.pop("prediction"),
            arrays=read,
            labels=labels,
            row_of=row_of,
            rectified=values,
        )

    @property
    def row_bytes(self) -> int:
        """What one row of a view takes in memory once it is read, a rectification included; without
        what all views share.
        """
        sizes = {**self.encoding.sizes, "class": self.num_classes, "view": 1, "sample": 1}
        encoded = sum(
            math.prod(spec.shape(sizes)) * arrays.held_dtype(spec.dtype).itemsize
            for spec in self.encoding.arrays().values()
        )
        prediction = arrays.get_array(self._group, "prediction").dtype.name
        return encoded + arrays.held_dtype(prediction).itemsize + 2 * torch.float32.itemsize

    def read_block(self, view: int, block: int, temperature: float = 1.0) -> Block:
        """One committed block, decoded for `temperature` as `Encoding.decode` says.

        Raises CacheError if it is not committed.
        """
        encoded = self.read_encoded_block(view, block)
        return Block(encoded.logits(temperature), encoded.labels, encoded.predictions)

    def read_encoded_block(self, view: int, block: int) -> EncodedBlock:
        """As `read_block`, for what needs only some of the rows."""
        if not self.commits.has(view, block):
            raise CacheError(
                f"{self.path}: block {block} of view {view} is not there",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        self.commits.check_objects(view, block)
        rows = self.grid.rows(block)
        read = self.blocks.read(self.blocks.specs, view, [rows], block)
        predictions = read.pop("prediction").long()
        return EncodedBlock(self.encoding, read, self.row_labels[rows], predictions)

    def distribution(
        self, view: int, rectified: str | None = None, temperature: float = 1.0
    ) -> Tensor:
        """softmax(logits / temperature) of every sample: float32 (N, C), in dataset order."""
        if rectified is not None:
            self.rectification(rectified).check_temperature(temperature)
        targets = self.read_view(view, rectified)
        samples = torch.arange(self.num_samples)
        read = targets.rows if rectified is None else targets.rectified_rows
        rows = read(samples, temperature)
        return torch.softmax(rows / temperature, dim=1)

    def eval_logits(self) -> tuple[Tensor, Tensor]:
        """The teacher's logits on the test split, float32 (M, C), each row minus its maximum; the
        labels, int64 (M,). Accuracy is that of `eval_predictions`.
        """
        return self._eval("eval_logits").float(), self.eval_labels

    def eval_predictions(self) -> Tensor:
        """int64 (M,): the teacher's argmax on the test split, of the exact rows."""
        return self._eval("eval_prediction").long()

    def eval_top1(self) -> float:
        """The teacher's accuracy on the test split, in [0, 1]."""
        right = self.eval_predictions() == self.eval_labels
        return float(right[self.eval_shown].double().mean())

    def _eval(self, name: str) -> Tensor:
        if not self.eval_commits.is_complete(0):
            raise CacheError(
                f"{self.path} has no logits of the test split yet",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        self.eval_commits.check_objects(0)
        return arrays.read_array(checked(self._group, self.eval_commits.objects_of(0)), name)

    def _require_view(self, commits: CommitLog, view: int) -> None:
        if not 0 <= view < self.num_views:
            raise CacheError(f"{self.path} has views 0 to {self.num_views - 1}, not {view}")
        self._check_room()
        needed = (self.commits, commits)
        for log in needed:  # so that records decide what is complete, and not a name
            log.of_view(view)
        if not all(log.is_complete(view) for log in needed):
            complete = len(commits.complete(self.num_views))
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
        """Encode, write and commit a block. logits: float32 (n, C); predictions: int64 (n,).

        Rows of skipped samples say what the teacher gives for black pixels, and the label as its
        prediction, so that they are never taken for its mistakes; no statistic counts them.
        """
        labels = self.row_labels[self.grid.rows(block)]
        samples = self.dataset_index[self.grid.rows(block)]
        unseen = torch.isin(samples, self.skipped())
        predictions = torch.where(unseen, labels, predictions)
        encoded = self.encoding.encode(logits, labels)
        checked = (
            (~unseen).nonzero().squeeze(1) if not bool(unseen.all()) else torch.arange(len(labels))
        )
        checked = checked[: checked_rows(self.num_classes)]
        some = {name: array[checked] for name, array in encoded.items()}
        fidelity = compare(self.encoding, logits[checked], some)
        self._check_calibration(fidelity)
        record = {
            **record,
            "right": int((predictions == labels)[~unseen].sum()),
            "fidelity": msgspec.to_builtins(fidelity),
        }
        if bool(unseen.any()):
            record["skipped"] = samples[unseen].sort().values.tolist()
        self.blocks.write(BlockId(view, block), encoded | {"prediction": predictions}, record)
        self.commits.compact(view)

    def _check_calibration(self, fidelity: Fidelity) -> None:
        if fidelity.saturated > _MAX_SATURATED * fidelity.rows:
            raise CacheError(
                f"{fidelity.saturated} of {fidelity.rows} rows go beyond what the encoding "
                f"{self.encoding.name} was fitted to",
                "Choose another --out and --encoding uint8 or float16.",
            )

    def _of_all_views(self, fidelity: Fidelity | None) -> Fidelity | None:
        """A fidelity, unless it was put together before views were added."""
        views = sum(view < self.num_views for view in self.commits.listed)
        if fidelity is None or not views:
            return fidelity
        most, grid = checked_rows(self.num_classes), self.grid
        last = grid.num_blocks - 1
        of_a_view = last * min(most, grid.block_rows) + min(most, grid.length(last))
        if self.skips:
            skipped = Counter((self.row_of[self.skipped()] // grid.block_rows).tolist())
            for block, left_out in skipped.items():
                length = grid.length(block)
                of_a_view -= min(most, length) - min(most, length - left_out)
        rows = views * of_a_view
        return fidelity if fidelity.rows >= rows else None

    def write_fidelity(self) -> None:
        """Put the fidelity of all committed blocks together among the root attributes."""
        parts = [
            msgspec.convert(records[block]["fidelity"], Fidelity)
            for _, records in self.commits.each_view()
            for block in sorted(records)
        ]
        if (fidelity := combined(parts)) != self.fidelity:
            self.fidelity = fidelity
            known, plain = self._group.attrs.asdict(), msgspec.to_builtins(fidelity)
            metadata.write_attributes(self._group, {**known, "fidelity": plain})

    def write_eval_logits(self, logits: Tensor, record: Record) -> None:
        """The teacher's logits on the test split, float32 (M, C). Kept are rows minus their maximum
        in half precision, and the argmax of the exact rows.

        With d = maximum - logit, rounding changes d by at most 2^-11 d, and so exp(-d / T) by at
        most 2^-11 d/T exp(-d/T) < 2e-4, whatever the offset and the scale of the logits. What lies
        beyond -65,504 is clamped: its probability is 0 in float32 at every T up to 600.
        """
        least = torch.finfo(torch.float16).min
        relative = logits.double() - logits.double().amax(1, keepdim=True)
        values = {
            "eval_logits": relative.clamp(min=least).half(),
            "eval_prediction": logits.argmax(1),
        }
        specs, objects = layout.base_arrays(self.num_classes), {}
        for name, kept in values.items():
            content = arrays.encode_whole(specs[name], kept)
            key = layout.whole_key(name, specs[name])
            write_object(self._group.store, key, content)
            objects[key] = described(content)
        self.eval_commits.commit(0, 0, {**record, "objects": objects})
        self.eval_commits.compact(0)

    # ---- rectifications -----------------------------------------------------------------

    @property
    def group(self) -> zarr.Group:
        """The Zarr group, for what looks at the store itself: verifying and mending."""
        return self._group

    @property
    def rectifications(self) -> list[str]:
        """The names of this cache's rectifications."""
        store, names = self._group.store, []
        for name in folders(store, "rectified"):
            if "zarr.json" not in entries(store, f"rectified/{name}"):
                if not folders(store, f"commits/rectified/{name}"):
                    continue  # a creation that stopped at its first step, or not ours
                raise CacheError(
                    f"{self.path}: the metadata of rectification '{name}' are missing",
                    "Run `pipeline verify CACHE --repair`.",
                )
            if arrays.subgroup(self._group, f"rectified/{name}").attrs.asdict():
                names.append(name)
        return names

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
        return Rectification.open(name, group, self.grid, self.sizes, self.identity.digest())

    def create_rectification(self, name: str, settings: RectificationSettings) -> Rectification:
        """A new rectification, or the one of this name if it has the same settings.

        Raises CacheError if it has others.
        """
        if name not in self.rectifications:
            self._check_free(name)
            group = self._group.create_group(f"rectified/{name}", overwrite=True)
            CommitLog(self._group.store, f"rectified/{name}", self.grid.num_blocks).clear()
            Rectification.create(group, self.grid, self.sizes, settings, self.identity.digest())
        rectification = self.rectification(name)
        if rectification.settings != settings:
            there = rectification.settings
            raise CacheError(
                f"rectification '{name}' exists with other settings: {there.method}, "
                f"{there.space}, T={there.temperature:g}",
                "Choose another --name.",
            )
        return rectification

    def _check_free(self, name: str) -> None:
        """Raise CacheError if somebody else has put something where a rectification would lie."""
        ours = set(layout.RECTIFIED_ARRAYS)
        if theirs := [n for n in folders(self._group.store, f"rectified/{name}") if n not in ours]:
            raise CacheError(
                f"{self.path}: rectified/{name} holds something that is no rectification: "
                f"{theirs[0]}",
                "Choose another --name.",
            )
