"""LogitCache: a teacher's logits in a Zarr v3 store, block by block.

    cache = LogitCache.open("cache.zarr")
    targets = cache.read_view(0)            # one view: what a student reads for one epoch
    targets.rows(torch.tensor([7, 3]))      # dataset indices -> float32 (2, C)

Order of writing: all metadata, then a block's shards, then its commit record. A reader never
touches a block without a record: Zarr itself would silently return zeros for it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from stages.cache import arrays, layout, metadata
from stages.cache.blocks import described
from stages.cache.calibrated import Calibrated
from stages.cache.encoding import Fidelity, checked_rows, combined, compare
from stages.cache.identity import SkippedSample
from stages.cache.layout import BlockId
from stages.cache.metadata import NewCache
from stages.cache.reading import CacheReader
from stages.cache.records import Record
from stages.cache.rectified import Rectification, RectificationSettings, create_rectification
from stages.cache.storage import location, write_object
from stages.errors import CacheError

_MAX_SATURATED = 0.01


class LogitCache(CacheReader):
    """A cache: `LogitCache.open(path)` to read one, `create` to make one.

    Attributes
    ----------
    num_views, num_samples, num_classes : int
    labels : Tensor
        int64 (N,), in dataset order.
    dataset_index, row_of : Tensor
        int64 (N,): the sample of each row, and the row of each sample.
    identity : Identity
        Teacher, dataset and views.
    """

    # ---- making and opening -----------------------------------------------------------------

    @staticmethod
    def open(path: str | Path, writable: bool = False, check: bool = True) -> "LogitCache":
        """Open a cache.

        Parameters
        ----------
        path : str or Path
            A folder, or the URL of an object store.
        writable : bool
            Whether blocks and views may be added.
        check : bool
            Whether to read and compare now the arrays that all views share; if False, they are
            compared when they are used.

        Raises
        ------
        CacheError
            If there is no cache, if it is of a newer version, or if what is read here is damaged:
            attributes, array documents, and the arrays that all views share.
        """
        where = location(path)
        cache = LogitCache(where, arrays.open_group(where, writable))
        if check:
            _ = cache.dataset_index, cache.row_labels, cache.eval_labels
        return cache

    @staticmethod
    def create(path: str | Path, new: NewCache) -> "LogitCache":
        """Write all metadata of a new cache; see `create_store`."""
        metadata.create_store(location(path), new)
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
            arrays.grow(self.rectification(name).blocks.group, num_views)
        arrays.grow(self.group, num_views, last="prediction")
        self.look_again()

    def add_skips(self, skips: Iterable[SkippedSample]) -> None:
        """Leave out more samples. Those that are left out stay so."""
        known = {(skip.split, skip.sample) for skip in self.skips}
        more = [skip for skip in skips if (skip.split, skip.sample) not in known]
        if more:
            self.skips = tuple(sorted([*self.skips, *more]))
            self._write_attributes({"skipped": msgspec.to_builtins(self.skips)})

    # ---- blocks -----------------------------------------------------------------------------

    def write_block(
        self, view: int, block: int, logits: Tensor, predictions: Tensor, record: Record
    ) -> None:
        """Encode, write and commit a block. logits: float32 (n, C); predictions: int64 (n,).

        Rows of skipped samples say what the teacher gives for black pixels, and the label as its
        prediction, so that they are never taken for its mistakes; no statistic counts them. Without
        labels nothing is right or wrong. Raises CacheError where the view that it depends on does
        not have this block yet.
        """
        rows = self.grid.rows(block)
        labels, samples = self.row_labels[rows], self.dataset_index[rows]
        unseen = torch.isin(samples, self.skipped())
        right = {}
        if self.labelled:
            predictions = torch.where(unseen, labels, predictions)
            right = {"right": int((predictions == labels)[~unseen].sum())}
        encoded = self._encode(BlockId(view, block), logits, labels, predictions)
        # Of a block that nobody has seen, anything: fidelity has to be of something.
        some = (unseen if bool(unseen.all()) else ~unseen).nonzero().squeeze(1)
        some = some[: checked_rows(self.num_classes)]
        known = {name: array[some] for name, array in encoded.items()}
        fidelity = compare(self.encoding, logits[some], known)
        self._check_calibration(fidelity)
        record = {
            **record,
            **right,
            **fidelity.to_json(),
        }
        if bool(unseen.any()):
            record["skipped"] = samples[unseen].sort().values.tolist()
        encoded["prediction"] = predictions
        own = {name: encoded[name] for name in self.blocks.names(view)}
        self.blocks.write(BlockId(view, block), own, record)
        self.commits.compact(view)

    def _encode(
        self, at: BlockId, logits: Tensor, labels: Tensor, predictions: Tensor
    ) -> dict[str, Tensor]:
        """The arrays of a block, and what they are coded beside."""
        if not self.blocks.has_anchor(at.view):
            return self.encoding.encode(logits, labels, predictions)
        anchor = self.blocks.read_anchor([self.grid.rows(at.block)], at.block)
        return self.encoding.encode_beside(anchor, logits, labels, predictions)

    def forget_stale(self) -> None:
        """Unmake the blocks, and what was made from them, that were written beside another block
        of the view that they depend on than is there now. Only for the single writer.
        """
        stale = self.blocks.stale()
        logs = [self.commits]
        if stale:
            logs += [self.rectification(name).commits for name in self.rectifications]
        for at in stale:
            for log in reversed(logs):
                if log.has(at):
                    log.forget(at)

    def write_calibrated(self, calibrated: Calibrated) -> None:
        """Put the temperature that was fitted among the root attributes."""
        self.calibrated = calibrated
        self._write_attributes({"calibrated": msgspec.to_builtins(calibrated)})

    # ---- fidelity ---------------------------------------------------------------------------

    def write_fidelity(self) -> None:
        """Put the fidelity of all committed blocks together among the root attributes."""
        parts = [
            Fidelity.from_json(records[block])
            for _, records in self.commits.each_view()
            for block in sorted(records)
        ]
        if (fidelity := combined(parts)) != self.fidelity:
            self.fidelity = fidelity
            self._write_attributes(fidelity.to_json())

    def _check_calibration(self, fidelity: Fidelity) -> None:
        if fidelity.saturated > _MAX_SATURATED * fidelity.rows:
            raise CacheError(
                f"{fidelity.saturated} of {fidelity.rows} rows go beyond what the encoding "
                f"{self.encoding.name} was fitted to",
                "Choose another --out and --encoding uint8 or float16.",
            )

    def _write_attributes(self, some: dict[str, Any]) -> None:
        metadata.write_attributes(self.group, {**self.group.attrs.asdict(), **some})

    # ---- the test split ---------------------------------------------------------------------

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
        objects = {}
        for name, kept in values.items():
            content = arrays.encode_whole(self.specs[name], kept)
            key = layout.whole_key(name, self.specs[name])
            write_object(self.group.store, key, content)
            objects[key] = described(content)
        self.eval_commits.commit(BlockId(0, 0), {**record, "objects": objects})
        self.eval_commits.compact(0)

    # ---- rectifications ---------------------------------------------------------------------

    def create_rectification(self, name: str, settings: RectificationSettings) -> Rectification:
        """A new rectification, or the one of this name if it has the same settings.

        Raises CacheError if it has others.
        """
        return create_rectification(self, name, settings)
