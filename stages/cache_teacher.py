r"""Stage one: run the teacher once, keep its logits for every view of every sample.

    pipeline cache-teacher --dataset digits --weights runs/teacher --views 25 \
        --augment pad-crop:pad=2 --out digits.zarr
    torchrun --nproc-per-node=8 -m pipeline cache-teacher ...

Blocks are computed one after another, or several views of the same rows at once, so that an image
is decoded once for them (`teacher/blocks.py`): each in the same batches whatever was done before.
They are written by another thread meanwhile; of several ranks each has its own, and the bytes are
the same.
Running the same command again computes what is missing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from stages.cache.storage import check_place
from stages.distributed import SharedProgress, first_rank_does
from stages.reporting import Reporter, Silent
from stages.teacher.blocks import see, write_missing
from stages.teacher.job import CacheJob, prepare
from stages.teacher.logits import TeacherPass
from stages.teacher.store import OpenedCache, opened

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
    ranks = job.ranks
    every = job.config.views * len(job.splits.train)
    reporter = reporter if reporter and ranks.first else Silent()
    check_place(out)
    for note in () if job.notes_shown else job.notes:
        reporter.say(note)
    task = "teacher pass" + (f", {ranks.world} ranks together" if ranks.world > 1 else "")
    progress = SharedProgress(
        ranks, lambda done, total: reporter.progress(task, done, total, "samples"), every
    )
    teacher = TeacherPass.of(job, progress.add)

    # 1) the store, its encoding fitted to the first rows; and what is missing in it
    with opened(teacher, out) as work:
        for warning in () if job.notes_shown else work.warnings:
            reporter.say(f"WARNING: {warning}")
        if done := job.config.views * work.cache.grid.num_blocks - len(work.missing):
            reporter.say(f"{done} blocks are there already, {len(work.missing)} are missing")

        # 2) the training views, block by block; first the view that others depend on
        computed = write_missing(teacher, work, progress)

        # 3) the test split, and what is known once all blocks are there
        def finish() -> CacheSummary:
            if ranks.world > 1:
                see(work.cache, computed)
            return _finished(job, work, len(computed))

        return first_rank_does(ranks, finish)


def _finished(job: CacheJob, work: OpenedCache, computed_blocks: int) -> CacheSummary:
    """Compute the test split, write what is known once all blocks are there, and sum up."""
    cache = work.cache
    logs = cache.commits, cache.eval_commits
    for commits in logs:
        commits.check_all_objects()
    cache.write_fidelity()
    if cache.tested and not cache.eval_commits.is_complete(0):
        test, samples = TeacherPass.on_test(job), torch.arange(len(job.splits.test))
        cache.write_eval_logits(test.finite_logits(samples, 0), work.record)
        test.feed.close()
    for commits in logs:
        commits.compact_rest()
    return CacheSummary(
        computed_blocks=computed_blocks,
        views=len(cache.complete_views),
        train_top1=[*cache.top1_per_view.values()],
        test_top1=cache.eval_top1() if cache.tested else None,
        normalisation=job.normalisation,
    )
