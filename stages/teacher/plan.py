"""How large and how long stage one would be, measured before anything is written."""

import operator
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.cache.encoding import (
    Encoding,
    Measured,
    measure_all,
    views_to_fit,
)
from stages.cache.layout import ANCHOR, BlockGrid, BlockId
from stages.cache.storage import location
from stages.errors import CacheError
from stages.teacher.blocks import runs_of
from stages.teacher.checks import teacher_warnings
from stages.teacher.job import CacheJob
from stages.teacher.logits import FirstRows, blocks_to_fit, check_finite
from stages.teacher.measure import made_empty, measured_teacher, second_view, write_seconds
from stages.teacher.memory import views_at_once
from stages.teacher.store import open_existing

_RECORD_BYTES, _OBJECT_BYTES = 370, 130
"""Of a commit record: what it says of its block, and of each of the block's objects."""


@dataclass(frozen=True)
class CachePlan:
    """What a run would do. bytes are on disk; missing_* is what is not there already.

    encodings: every encoding on real rows of this teacher. bytes_per_view: of a row. free_bytes:
    None where there is no knowing, in an object store. samples_per_second: of one rank, computed
    and written; hours: of all together. fixed_*: of what does not grow with the views: documents,
    labels, the test split; their seconds are those that are still to come. warnings: whether the
    teacher knows the dataset, see `teacher_warnings`. normalisation: in words, with its source.

    views_at_once: made of an image while it is decoded (`stages.teacher.memory`). decodes: images
    that the missing blocks decode, 0 where they are in memory; singly_*: with one view at once.
    """

    samples: int
    views: int
    blocks: int
    missing_blocks: int
    encoding: str
    bytes_per_view: float
    files: int
    samples_per_second: float
    free_bytes: int | None
    device: str
    encodings: list[Measured]
    ranks: int = 1
    fixed_bytes: float = 0.0
    fixed_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    normalisation: str = ""
    views_at_once: int = 1
    decodes: int = 0
    singly_decodes: int = 0
    singly_samples_per_second: float | None = None

    @property
    def missing_share(self) -> float:
        """Which share of the blocks is still to be made, in [0, 1]."""
        return self.missing_blocks / self.blocks

    @property
    def total_bytes(self) -> float:
        """What the whole cache takes on disk."""
        return self.bytes_per_view * self.samples * self.views + self.fixed_bytes

    @property
    def hours(self) -> float:
        """How long the missing blocks take; of several ranks, the one with the most."""
        return self._hours(self.samples_per_second)

    @property
    def singly_hours(self) -> float:
        """As `hours`, with one view at once."""
        return self._hours(self.singly_samples_per_second or self.samples_per_second)

    def _hours(self, samples_per_second: float) -> float:
        longest_share = -(-self.missing_blocks // self.ranks) / self.blocks
        seconds = self.samples * self.views * longest_share / samples_per_second
        return (seconds + self.fixed_seconds) / 3600

    def check_fits(self, out: str | Path) -> None:
        """Raise CacheError if the disk is too small."""
        fixed = self.fixed_bytes if self.missing_blocks == self.blocks else 0
        needed = (self.total_bytes - self.fixed_bytes) * self.missing_share + fixed
        if self.free_bytes is not None and needed > self.free_bytes:
            raise CacheError(
                f"{out} needs {needed / 1e6:,.1f} MB more, "
                f"{self.free_bytes / 1e6:,.1f} MB are free",
                "Cache fewer --views, use a smaller --encoding, or choose a larger disk.",
            )


def plan_cache(job: CacheJob, out: str | Path) -> CachePlan:
    """Measure the teacher and all encodings on real rows, and extrapolate; on one rank.

    Raises CacheError if the encoding asked for does not hold the KL asked for.
    """
    config, train, order = job.config, job.splits.train, job.row_order
    # 1) the teacher, on the rows that encodings are fitted to
    logits, singly = measured_teacher(job)
    check_finite(logits, order, "view 0")
    at_once = views_at_once(job)
    computed_per_second = measured_teacher(job, at_once)[1] if at_once > 1 else singly
    cache = open_existing(job, out)
    second = second_view(job, len(logits), len(logits) / singly, cache)
    first = FirstRows.of(job, logits, second)
    logits, labels, second = first.rows, first.labels, first.second

    # 2) the encodings, on its rows
    started = time.perf_counter()
    coding = first.fitted(config) if cache is None else cache.encoding
    fitted = time.perf_counter() - started
    coding.encode(logits, labels)  # raises where a logit is out of its range
    encodings = measure_all(logits, labels, config.budget, coding, second, config.views)
    chosen = next(m for m in encodings if m.coding is coding)

    # 3) what a whole run is then
    grid = cache.grid if cache else job.grid
    write = write_seconds(job, coding, logits, labels, grid)
    # On a GPU blocks are written while others are computed; on CPUs both want the same cores.
    whole = operator.add if job.device.type == "cpu" else max
    every = [BlockId(v, b) for v in range(config.views) for b in range(grid.num_blocks)]
    missing = every if cache is None else cache.commits.missing(range(config.views))
    made_bytes, made_seconds = made_empty(job, coding, order)
    tested = len(job.splits.test) / singly
    eval_there = cache is not None and cache.eval_commits.is_complete(0)  # or empty: no seconds
    return CachePlan(
        samples=len(train),
        views=config.views,
        blocks=len(every),
        missing_blocks=len(missing),
        encoding=coding.name,
        bytes_per_view=chosen.row_bytes,
        files=count_files(coding, config.views, grid.num_blocks),
        samples_per_second=1 / whole(1 / computed_per_second, write),
        device=str(job.device),
        free_bytes=_free_bytes(out),
        encodings=encodings,
        ranks=job.ranks.world,
        fixed_bytes=made_bytes
        + len(job.splits.test) * _half_row_bytes(encodings, job.num_classes)
        + len(every) * (_RECORD_BYTES + _OBJECT_BYTES * _arrays_of_a_block(coding, ANCHOR + 1)),
        normalisation=job.normalisation,
        warnings=tuple(teacher_warnings(logits, labels, train.class_names)),
        fixed_seconds=(0 if cache else made_seconds + fitted) + (0 if eval_there else tested),
        views_at_once=at_once,
        decodes=_decodes(job, grid, missing, cache is None, at_once),
        singly_decodes=_decodes(job, grid, missing, cache is None, 1),
        singly_samples_per_second=1 / whole(1 / singly, write),
    )


# ---- details --------------------------------------------------------------------------------


def _decodes(
    job: CacheJob, grid: BlockGrid, missing: Sequence[BlockId], new: bool, at_once: int
) -> int:
    """How many images are decoded for these blocks; in mixed views the partner of each as well.
    new: of a new cache the blocks that the encoding is fitted to are computed first.
    """
    if job.splits.train.images is not None:
        return 0
    fitted = blocks_to_fit(grid, job.num_classes) if new else 0
    views = views_to_fit(job.config.encoding, job.config.views)
    first = {BlockId(view, block) for view in views for block in range(fitted)}
    rest = [at for at in missing if at not in first]
    runs = [*runs_of([*first], len(views)), *runs_of(rest, at_once)]
    partners = 1 if job.policy.mixes else 0
    return sum(grid.length(run.block) * (1 + partners * len(run.views)) for run in runs)


def _half_row_bytes(encodings: list[Measured], num_classes: int) -> float:
    """Of a row of the test split's logits, which are kept in half precision."""
    halves = (m.row_bytes for m in encodings if m.coding.name == "float16")
    return next(halves, 2.0 * num_classes)


def count_files(coding: Encoding, views: int, blocks_per_view: int) -> int:
    """How many files or objects a finished cache has."""
    arrays = len({"prediction", *coding.arrays()})
    whole = len(coding.calibration_arrays()) + 5  # one chunk each
    # documents of groups and arrays, whole arrays, the copy of the attributes, the test's record
    metadata = 3 + (arrays + whole) + whole + 1 + 1
    objects = [_arrays_of_a_block(coding, view) for view in (ANCHOR, ANCHOR + 1)]
    return blocks_per_view * (objects[0] + (views - 1) * objects[1]) + views + metadata


def _arrays_of_a_block(coding: Encoding, view: int) -> int:
    arrays = coding.arrays().items()
    return len({"prediction", *(name for name, spec in arrays if spec.of_view(view))})


def _free_bytes(out: str | Path) -> int | None:
    where = location(out)
    if not isinstance(where, Path):
        return None
    there = next(p for p in (where.absolute(), *where.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
