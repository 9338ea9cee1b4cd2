"""How large and how long stage one would be, measured before anything is written."""

import operator
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.encoding import (
    Encoding,
    Measured,
    checked_rows,
    compare,
    fit_rows,
    measure_all,
    views_to_fit,
)
from stages.cache.layout import ANCHOR, BlockGrid, BlockId
from stages.cache.metadata import NewCache
from stages.cache.storage import location
from stages.device import versions
from stages.errors import CacheError
from stages.inputs.probes import PROBES
from stages.teacher.checks import teacher_warnings
from stages.teacher.job import CacheJob
from stages.teacher.logits import FirstRows, TeacherPass, blocks_to_fit, check_finite
from stages.teacher.runs import runs_of, views_at_once
from stages.teacher.store import open_existing

MEASURED_SECONDS = 2.0
MOST_SECONDS = 20.0
"""The teacher is measured on the rows that encodings are fitted to, or on what it does in this."""
_SECOND_SECONDS = 5.0
"""A second view is measured where it takes no longer, for what only several views can show."""
_WRITTEN = 2**23
"""Logits that writing is timed on."""
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

    views_at_once: made of an image while it is decoded, see `stages.teacher.runs`. decodes: images
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
    second = _second_view(job, len(logits), len(logits) / singly, cache)
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
    write = _write_seconds(job, coding, logits, labels, grid)
    # On a GPU blocks are written while others are computed; on CPUs both want the same cores.
    whole = operator.add if job.device.type == "cpu" else max
    every = [BlockId(v, b) for v in range(config.views) for b in range(grid.num_blocks)]
    missing = every if cache is None else cache.commits.missing(range(config.views))
    made_bytes, made_seconds = _made_empty(job, coding, order)
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


def _second_view(
    job: CacheJob, rows: int, seconds: float, cache: LogitCache | None
) -> Tensor | None:
    """The first rows of view 1: float32 (n, C). None where there is one view, or where it takes
    long and the encoding that is asked for does not need it. seconds: what as many rows of view 0
    took.
    """
    asked = job.config.encoding if cache is None else cache.encoding.name
    needed = 1 in views_to_fit(asked, job.config.views)
    if not needed and (job.config.views == 1 or seconds > _SECOND_SECONDS):
        return None
    teacher = TeacherPass.of(job)
    logits = teacher.logits(job.row_order[:rows], 1)
    teacher.feed.close()
    check_finite(logits, job.row_order[:rows], "view 1")
    return logits


def measured_teacher(job: CacheJob, at_once: int = 1) -> tuple[Tensor, float]:
    """Logits of the first rows of view 0, float32 (n, C), and how many rows a second there are.
    at_once: views that are made of an image while it is decoded; a row is one view of a sample.

    Runs of batches grow: what workers feed shows its pace once several batches are under way.
    """
    order, most = job.row_order, fit_rows(job.num_classes)
    batch, wanted = min(job.config.batch_size, len(order)), min(most, len(order))
    teacher, views = TeacherPass.of(job), range(at_once)
    teacher.of_views(order[: -(-batch // at_once)], views)  # warms up: allocations, workers
    kept: list[Tensor] = []
    timed: list[tuple[int, float]] = []
    done, run, began = 0, batch, time.perf_counter()
    while (spent := time.perf_counter() - began) < MOST_SECONDS:
        if done >= wanted and spent > MEASURED_SECONDS:
            break
        samples = order[torch.arange(done, done + -(-run // at_once)) % len(order)]
        started = time.perf_counter()
        logits = teacher.of_views(samples, views)  # waits for the device
        timed.append((at_once * len(samples), time.perf_counter() - started))
        if done < wanted:
            kept.append(logits[0])
        done, run = done + run, max(batch, min(2 * run, most // batch * batch))
    teacher.feed.close()
    settled = timed[len(timed) // 2 :]
    pace = sum(rows for rows, _ in settled) / sum(seconds for _, seconds in settled)
    return torch.cat(kept)[:wanted], pace


def _write_seconds(
    job: CacheJob, coding: Encoding, logits: Tensor, labels: Tensor, grid: BlockGrid
) -> float:
    """What it takes to encode, check, write and commit a row: of a block that is thrown away."""
    rows = min(len(logits), grid.block_rows, max(1, _WRITTEN // job.num_classes))
    logits, labels = logits[:rows], labels[:rows]
    with tempfile.TemporaryDirectory() as folder:
        cache = _empty_cache(folder, job, coding, torch.arange(rows), labels, rows)
        cache.write_block(0, 0, logits, logits.argmax(1), {})
        started = time.perf_counter()
        cache.write_block(job.config.views - 1, 0, logits, logits.argmax(1), {})
        written = time.perf_counter() - started
    some = slice(checked_rows(job.num_classes))
    arrays = coding.encode(logits[some], labels[some])
    started = time.perf_counter()
    compare(coding, logits[some], arrays)
    checked = time.perf_counter() - started  # as much in a block of more rows
    return max(0.0, written - checked) / rows + checked / grid.block_rows


def _made_empty(job: CacheJob, coding: Encoding, order: Tensor) -> tuple[int, float]:
    """Bytes and seconds of the cache without any block: it is made, and thrown away."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        labels, block_rows = job.splits.train.labels, job.config.block_rows
        _empty_cache(folder, job, coding, order, labels, block_rows)
        files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        return sum(files), time.perf_counter() - started


def _empty_cache(
    folder: str, job: CacheJob, coding: Encoding, order: Tensor, labels: Tensor, block_rows: int
) -> LogitCache:
    """A cache of some rows, in the form that the real one will have."""
    dataset = msgspec.structs.replace(job.identity.dataset, num_samples=len(order))
    new = NewCache(
        msgspec.structs.replace(job.identity, dataset=dataset),
        coding,
        job.config.views,
        order,
        labels,
        job.splits.test.labels,
        pixel_probes=[2**32 - 1] * PROBES,
        provenance={"config": msgspec.to_builtins(job.config), "versions": versions()},
        block_rows=block_rows,
    )
    return LogitCache.create(folder, new)


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
