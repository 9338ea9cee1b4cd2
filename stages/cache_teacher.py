r"""Stage one: run the teacher once, keep its logits for every view of every sample.

    pipeline cache-teacher --dataset digits --weights runs/teacher --views 25 \
        --augment pad-crop:pad=2 --out digits.zarr
    torchrun --nproc-per-node=8 -m pipeline cache-teacher ...

Blocks are computed one after another, or several views of the same rows at once, so that an image
is decoded once for them (`teacher/runs.py`): each in the same batches whatever was done before.
They are written by another thread meanwhile; of several ranks each has its own, and the bytes are
the same.
Running the same command again computes what is missing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.cache import LogitCache
from stages.cache.commits import Record
from stages.cache.layout import BlockId
from stages.cache.lock import exclusive, joined
from stages.cache.storage import Location, check_place, location
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
from stages.teacher.blocks import BlockWriter, beside_anchors, see, share, with_anchors
from stages.teacher.checks import teacher_warnings
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass, first_rows
from stages.teacher.runs import in_runs, views_at_once
from stages.teacher.store import Blocks, opened

__all__ = ["CacheJob", "CacheSummary", "cache_teacher", "prepare"]


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
        for warning in [] if job.notes_shown else _warnings(job, fitted):
            reporter.say(f"WARNING: {warning}")

        def look() -> tuple[list[BlockId], list[BlockId], int]:
            cache.commits.extent()  # reads all records: damage is reported before hours of work
            return cache.commits.missing(range(views)), [*fitted], views_at_once(job)

        missing, there, at_once = first_rank_does(ranks, look)
        progress.expect(cache, missing)
        if done := views * cache.grid.num_blocks - len(missing):
            reporter.say(f"{done} blocks are there already, {len(missing)} are missing")

        # 2) the training views, block by block; first the view that others depend on
        record: Record = {"device": device_name(job.device), "versions": versions()}
        blocks, left = BlockWriter(teacher, cache, record, fitted, at_once), missing
        if cache.encoding.of_anchor:
            blocks.write(with_anchors(missing, there, blocks))
            wait_for_all(ranks, progress.look)
            left, there = beside_anchors(cache, missing, job), []
            progress.expect(cache, missing := [*{*missing, *left}])
        blocks.write(share(in_runs(left, at_once), there, ranks))
        teacher.feed.close()
        wait_for_all(ranks, progress.look)

        # 3) the test split, and what is known once all blocks are there
        def finish() -> CacheSummary:
            if ranks.world > 1:
                see(cache, missing)
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


def _warnings(job: CacheJob, fitted: Blocks) -> list[str]:
    """Whether the teacher knows the dataset, by the rows that the encoding was fitted to."""
    if not fitted:
        return []
    first = [logits for at, logits in fitted.items() if at.view == 0]
    rows, labels = job.seen_rows(first_rows(first, job.num_classes))
    return teacher_warnings(rows, labels, job.splits.train.class_names)


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

    def expect(self, cache: LogitCache, blocks: list[BlockId]) -> None:
        """So much there is to do in all."""
        self.total = sum(cache.grid.length(block) for _, block in blocks)

    def __call__(self, rows: int) -> None:
        self._reporter.progress(self._task, self._count.add(rows), self.total, "samples")

    def look(self) -> int:
        """Show what the others have done meanwhile, and return it."""
        done = self._count.add()
        self._reporter.progress(self._task, done, self.total, "samples")
        return done
