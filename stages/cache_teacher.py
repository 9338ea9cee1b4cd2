r"""Stage one: run the teacher once, keep its logits for every view of every sample.

    pipeline cache-teacher --dataset digits --weights runs/teacher --views 25 \
        --augment pad-crop:pad=2 --out digits.zarr
    torchrun --nproc-per-node=8 -m pipeline cache-teacher ...

Blocks are computed one after another, or several views of the same rows at once, so that an image
is decoded once for them (`cache_runs.py`): each in the same batches whatever was done before. They
are written by another thread meanwhile; of several ranks each has its own, and the bytes are the
same.
Running the same command again computes what is missing.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BackgroundWriter
from stages.cache.commits import Record
from stages.cache.encoding import fit_rows
from stages.cache.layout import BlockId
from stages.cache.lock import exclusive, joined
from stages.cache.storage import Location, check_place, location
from stages.cache_job import CacheJob, prepare
from stages.cache_of_job import Blocks, opened
from stages.cache_runs import in_runs, runs_of, views_at_once, waiting
from stages.device import device_name, versions
from stages.distributed import (
    Ranks,
    SharedCount,
    first_rank_does,
    first_rank_first,
    wait_for_all,
)
from stages.errors import CacheError
from stages.reporting import Reporter, Silent
from stages.teacher_checks import teacher_doubts
from stages.teacher_pass import TeacherPass

__all__ = ["CacheJob", "CacheSummary", "cache_teacher", "prepare"]

_SHOWN_SECONDS = 90.0
"""What one machine wrote, another sees within this on a network file system."""


@dataclass(frozen=True)
class CacheSummary:
    """What a run leaves: how many blocks it computed, and the teacher's top-1 in [0, 1]: of every
    view, none without labels; of the test split, None without one.
    """

    computed_blocks: int
    views: int
    train_top1: list[float]
    test_top1: float | None
    normalisation: str = ""


def cache_teacher(job: CacheJob, out: str | Path, reporter: Reporter | None = None) -> CacheSummary:
    """Make the cache at `out`, or complete it, or append views to it; all ranks of a launch do so
    together, and all have the summary. What is reported is the first rank's to say, for all.

    Raises IdentityError if it was made from something else, CacheError if it cannot be written.
    """
    ranks, views = job.ranks, job.config.views
    reporter = reporter if reporter and ranks.first else Silent()
    check_place(out)
    for note in () if job.notes_shown else job.notes:
        reporter.say(note)
    with _held(location(out), ranks):
        # 1) the store, its encoding fitted to the first rows; and what is missing in it
        progress = _Progress(job, reporter)
        teacher = TeacherPass.of(job, progress)
        with first_rank_first(ranks):
            cache, fitted = opened(teacher, out)
        for doubt in [] if job.notes_shown else _doubts(job, fitted):
            reporter.say(f"WARNING: {doubt}")

        def look() -> tuple[list[BlockId], list[BlockId], int]:
            cache.commits.extent()  # reads all records: damage is reported before hours of work
            return cache.commits.missing(range(views)), [*fitted], views_at_once(job)

        missing, there, at_once = first_rank_does(ranks, look)
        progress.total = sum(cache.grid.length(block) for _, block in missing)
        if done := views * cache.grid.num_blocks - len(missing):
            reporter.say(f"{done} blocks are there already, {len(missing)} are missing")

        # 2) the training views, block by block
        record: Record = {"device": device_name(job.device), "versions": versions()}
        mine = share(in_runs(missing, at_once), there, ranks)
        write = functools.partial(_write_block, cache, record)
        with BackgroundWriter(write, waiting(job, at_once)).running() as writer:
            for at in mine:
                if at in fitted:
                    writer.put((at, fitted.pop(at)))
            for run in runs_of([at for at in mine if at not in there], at_once):
                samples = cache.dataset_index[cache.grid.rows(run.block)]
                computed = teacher.finite_of_views(samples, run.views)
                for view in run.views:
                    writer.put((BlockId(view, run.block), computed.pop(0)))
        teacher.feed.close()
        wait_for_all(ranks, progress.look)

        # 3) the test split, and what is known once all blocks are there
        def finish() -> CacheSummary:
            if ranks.world > 1:
                _see(cache, missing)
            logs = cache.commits, cache.eval_commits
            for commits in logs:
                commits.check_all_objects()
            cache.write_fidelity()
            if cache.tested and not cache.eval_commits.is_complete(0):
                test, samples = TeacherPass.on_test(job), torch.arange(len(job.splits.test))
                cache.write_eval_logits(test.finite_logits(samples, 0), record)
                test.feed.close()
            for commits in logs:
                commits.compact_rest()
            return _summary(cache, len(missing), job.normalisation)

        return first_rank_does(ranks, finish)


def share(missing: list[BlockId], fitted: list[BlockId], ranks: Ranks) -> list[BlockId]:
    """The missing (view, block) pairs that are this rank's to write: a run of them, so that most
    views are one rank's. Those that fitting the encoding computed are with the first rank.
    """
    rest = [pair for pair in missing if pair not in fitted]
    mine = [rest[i] for i in ranks.share(len(rest))]
    return [*fitted, *mine] if ranks.first else mine


# ---- details --------------------------------------------------------------------------------


@contextlib.contextmanager
def _held(where: Location, ranks: Ranks) -> Iterator[None]:
    """The store's folder, made and locked by the first rank for its launch."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            if isinstance(where, Path):
                try:
                    where.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise CacheError(
                        f"cannot make {where}: {error.strerror}", "Choose another --out."
                    ) from error
            stack.enter_context(exclusive(where, shared=ranks.world > 1))

        first_rank_does(ranks, take)
        if not ranks.first:
            stack.enter_context(joined(where))
        yield


def _doubts(job: CacheJob, fitted: Blocks) -> list[str]:
    """Whether the teacher knows the dataset, by the rows that the encoding was fitted to."""
    if not fitted:
        return []
    most = fit_rows(job.num_classes)
    rows, labels = job.seen_rows(torch.cat([block[:most] for block in fitted.values()])[:most])
    return teacher_doubts(rows, labels, job.splits.train.class_names)


def _see(cache: LogitCache, blocks: list[BlockId]) -> None:
    """Read all commit records again, until those of the other ranks show."""
    deadline = time.monotonic() + _SHOWN_SECONDS
    while True:
        cache.commits.reread()
        hidden = {*blocks} & {*cache.commits.missing({view for view, _ in blocks})}
        if not hidden:
            return
        if time.monotonic() > deadline:
            raise CacheError(
                f"{cache.path}: {len(hidden)} blocks that other ranks wrote cannot be seen here",
                "Give --out on a file system that all ranks share, then run the command again.",
            )
        time.sleep(1)


def _summary(cache: LogitCache, computed_blocks: int, normalisation: str) -> CacheSummary:
    top1 = cache.top1_per_view
    return CacheSummary(
        computed_blocks=computed_blocks,
        views=len(cache.complete_views),
        train_top1=[*top1.values()],
        test_top1=cache.eval_top1() if cache.tested else None,
        normalisation=normalisation,
    )


class _Progress:
    """How far all ranks are together."""

    def __init__(self, job: CacheJob, reporter: Reporter) -> None:
        self._reporter, self._count = reporter, SharedCount(job.ranks)
        world = job.ranks.world
        self._task = "teacher pass" + (f", {world} ranks together" if world > 1 else "")
        self.total = job.config.views * len(job.splits.train)

    def __call__(self, rows: int) -> None:
        self._reporter.progress(self._task, self._count.add(rows), self.total, "samples")

    def look(self) -> int:
        """Show what the others have done meanwhile, and return it."""
        done = self._count.add()
        self._reporter.progress(self._task, done, self.total, "samples")
        return done


def _write_block(cache: LogitCache, record: Record, computed: tuple[BlockId, Tensor]) -> None:
    at, logits = computed
    cache.write_block(*at, logits, logits.argmax(1), record)
