"""Reading a cache: views, blocks, the test split. `LogitCache` in `store.py` adds the writing."""

from collections.abc import Mapping, Sequence

import torch
import zarr
from torch import Tensor

from stages.cache import arrays
from stages.cache.blocks import BlockGroup, checked
from stages.cache.commits import CommitLog
from stages.cache.description import CacheDescription
from stages.cache.encoding import Fidelity, rows_of_a_view
from stages.cache.layout import ANCHOR, BlockId
from stages.cache.rectified import Rectification, open_rectification, rectification_names
from stages.cache.storage import Location
from stages.cache.targets import Block, EncodedBlock, ViewTargets
from stages.errors import CacheError


class CacheReader(CacheDescription):
    """What an open cache holds, read by view and by block."""

    def __init__(self, path: Location, group: zarr.Group) -> None:
        super().__init__(path, group)
        blocks, digest = self.grid.num_blocks, self.identity_digest
        self.commits = CommitLog(group.store, "logits", blocks, digest)
        self.eval_commits = CommitLog(group.store, "eval", 1, digest)
        by_block = {name: spec for name, spec in self.specs.items() if spec.by_block}
        of_anchor = self.encoding.of_anchor
        self.blocks = BlockGroup(group, self.commits, self.grid, by_block, of_anchor)
        self._rectifications: dict[str, Rectification] = {}
        self.fidelity = self._of_all_views(self.fidelity)

    # ---- views ------------------------------------------------------------------------------

    @property
    def complete_views(self) -> list[int]:
        """The views that are stored, ascending; none while the view that others depend on is not.
        A damaged record shows when its view is read.

        Raises CacheError where views are committed for which the arrays have no room.
        """
        self._check_room()
        complete = self.commits.complete(self.num_views)
        return complete if not self.encoding.of_anchor or ANCHOR in complete else []

    def top1(self, view: int) -> float:
        """The teacher's accuracy on a complete view, in [0, 1], without samples left out. Raises
        CacheError without labels.
        """
        self.require_labels("accuracy")
        right = self.predictions(view) == self.row_labels
        records = self.commits.of_view(view)
        blocks = range(self.grid.num_blocks)
        unseen = torch.cat([self.skipped_rows(block, records[block]) for block in blocks])
        return float(right[~unseen].double().mean())

    @property
    def top1_per_view(self) -> dict[int, float]:
        """As `top1`, of every complete view; from the records of its blocks, without any array.
        Empty without labels.
        """
        if not self.labelled:
            return {}
        return {
            view: sum(int(record["right"]) for record in records.values())
            / (self.num_samples - sum(len(r.get("skipped", ())) for r in records.values()))
            for view, records in self.commits.each_view(self.complete_views)
        }

    def predictions(self, view: int, rows: slice | None = None) -> Tensor:
        """The teacher's argmax on a complete view, taken before any encoding.

        Parameters
        ----------
        view : int
        rows : slice, optional
            A run of rows; all if None.

        Returns
        -------
        Tensor
            int64 (n,), in the order of rows.
        """
        self._require_view(view, self.commits)
        runs = [rows or slice(0, self.num_samples)]
        return self.blocks.read(["prediction"], view, runs)["prediction"].long()

    def read_view(
        self,
        view: int,
        rectified: str | None = None,
        runs: Sequence[slice] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
    ) -> ViewTargets:
        """Read the targets of a view, still encoded.

        Parameters
        ----------
        view : int
        rectified : str, optional
            A rectification, whose rows are then given by `rectified_rows`.
        runs : sequence of slice, optional
            Disjoint runs of rows to read; all rows if None. Whole chunks of `grid` are read
            without waste.
        anchor : mapping, optional
            `ViewTargets.anchor` of another view with the same runs: not read again.

        Returns
        -------
        ViewTargets
            Asked by dataset index int64 (n,): `rows(samples)` is float32 (n, C), `wrong(samples)`
            bool (n,), `rectified_rows(samples)` float32 (n, C).

        Raises
        ------
        CacheError
            If the view is not complete or damaged, or if there is no such rectification.
        """
        self._require_view(view, self.commits)
        labels, row_of = self.row_labels, self.row_of
        if runs is not None:
            rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            labels, row_of = labels[rows], torch.full_like(row_of, len(rows))
            row_of[self.dataset_index[rows]] = torch.arange(len(rows))
        runs = [slice(0, self.num_samples)] if runs is None else runs
        values = None
        if rectified is not None:
            rectification = self._rectifications.get(rectified) or self.rectification(rectified)
            self._require_view(view, rectification.commits)
            values = rectification.read_values(view, runs)
        beside: Mapping[str, Tensor] = {}
        if self.blocks.has_anchor(view):
            self.blocks.check_anchor(view)
            beside = anchor or self.blocks.read_anchor(runs)
        read = self.blocks.read(self.blocks.names(view), view, runs)
        return ViewTargets(
            encoding=self.encoding,
            predictions=read["prediction"],
            arrays=self._encoded(read),
            anchor=beside,
            labels=labels,
            row_of=row_of,
            rectified=values,
            labelled=self.labelled,
            calibration=None if self.calibrated is None else self.calibrated.temperature,
        )

    def distribution(
        self, view: int, rectified: str | None = None, temperature: float = 1.0
    ) -> Tensor:
        """The teacher's distribution for every sample: softmax(logits / temperature).

        Parameters
        ----------
        view : int
        rectified : str, optional
            A rectification, whose rows to take instead.
        temperature : float

        Returns
        -------
        Tensor
            float32 (N, C), in dataset order.

        Raises
        ------
        CacheError
            As `read_view`; also if rows are not known at this temperature.
        """
        if rectified is not None:
            self.rectification(rectified).check_temperature(temperature)
        targets = self.read_view(view, rectified)
        samples = torch.arange(self.num_samples)
        read = targets.rows if rectified is None else targets.rectified_rows
        rows = read(samples, temperature)
        return torch.softmax(rows / temperature, dim=1)

    def _encoded(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the arrays that the encoding names."""
        return {name: read[name] for name in self.encoding.arrays() if name in read}

    def _check_room(self) -> None:
        if self.commits.beyond(self.num_views):
            self.look_again()
        if beyond := self.commits.beyond(self.num_views):
            raise CacheError(
                f"{self.path}: view {max(beyond)} is committed, the arrays have {self.num_views}",
                "Run `pipeline verify CACHE --repair`.",
            )

    def _require_view(self, view: int, commits: CommitLog) -> None:
        """Raise CacheError unless a view is complete, in the logits and in `commits`.

        What other processes have written since is looked for before that.
        """
        logs = [self.commits] if commits is self.commits else [self.commits, commits]
        if self.blocks.has_anchor(view):
            self._require_view(ANCHOR, self.commits)
        if not (0 <= view < self.num_views and all(log.has_view(view) for log in logs)):
            self.look_again()
            for log in logs:
                log.reread()
        if not 0 <= view < self.num_views:
            raise CacheError(f"{self.path} has views 0 to {self.num_views - 1}, not {view}")
        self._check_room()
        if not all(log.has_view(view) for log in logs):
            complete = len(commits.complete(self.num_views))
            stage = "cache-teacher" if commits is self.commits else "rectify"
            raise CacheError(
                f"{self.path}: view {view} of {commits.part} is not complete "
                f"({complete} of {self.num_views} views are)",
                f"Run `pipeline {stage}` again to finish it.",
            )

    # ---- blocks -----------------------------------------------------------------------------

    def read_block(self, view: int, block: int, temperature: float = 1.0) -> Block:
        """One committed block, decoded for `temperature` as `Encoding.decode` says.

        Raises CacheError if it is not committed.
        """
        encoded = self.read_encoded_block(view, block)
        return Block(encoded.logits(temperature), encoded.labels, encoded.predictions)

    def read_encoded_block(self, view: int, block: int) -> EncodedBlock:
        """As `read_block`, for what needs only some of the rows."""
        if not self.commits.has(BlockId(view, block)):
            raise CacheError(
                f"{self.path}: block {block} of view {view} is not there",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        rows = self.grid.rows(block)
        read = self.blocks.read(self.blocks.names(view), view, [rows], block)
        encoded = self._encoded(read)
        if self.blocks.has_anchor(view):
            self.blocks.check_anchor(view, block)
            encoded |= self.blocks.read_anchor([rows], block)
        predictions = read["prediction"].long()
        return EncodedBlock(self.encoding, encoded, self.row_labels[rows], predictions)

    # ---- fidelity ---------------------------------------------------------------------------

    def _of_all_views(self, fidelity: Fidelity | None) -> Fidelity | None:
        """A fidelity, unless it was put together before views were added."""
        views = sum(view < self.num_views for view in self.commits.listed)
        if fidelity is None or not views:
            return fidelity
        skipped = self.row_of[self.skipped()] if self.skips else torch.empty(0, dtype=torch.int64)
        rows = views * rows_of_a_view(self.grid, self.num_classes, skipped)
        return fidelity if fidelity.rows >= rows else None

    # ---- the test split ---------------------------------------------------------------------

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
        if not self.tested:
            raise CacheError(
                f"{self.path} has no test split", "Cache it with --test or --eval-dataset."
            )
        if not self.eval_commits.is_complete(0):
            raise CacheError(
                f"{self.path} has no logits of the test split yet",
                "Run `pipeline cache-teacher` again to finish it.",
            )
        array = arrays.get_array(self.group, name)
        return arrays.read_values(checked(array, self.eval_commits.objects_of(0)))

    # ---- rectifications ---------------------------------------------------------------------

    @property
    def rectifications(self) -> list[str]:
        """The names of this cache's rectifications."""
        return rectification_names(self)

    def rectification(self, name: str) -> Rectification:
        """A rectification, opened afresh. Raises CacheError if there is none of this name."""
        self._rectifications[name] = open_rectification(self, name)
        return self._rectifications[name]
