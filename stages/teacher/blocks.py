"""Which blocks each rank of stage one computes, in which order; another thread writes them.

A run is one block's rows in several views. Every image of it is decoded once, and every view of it
is one block, computed in the same batches as if it were alone: its bytes do not depend on the run.
Where views depend on one of them, its blocks are written first, by whichever ranks, and with them
what is made of the same decoded images; the rest once all of them are there.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from stages.cache import LogitCache
from stages.cache.layout import ANCHOR, BlockId
from stages.distributed import Ranks, SharedProgress, first_rank_does
from stages.errors import CacheError
from stages.teacher.logits import TeacherPass
from stages.teacher.memory import waiting
from stages.teacher.store import OpenedCache

_SHOWN_SECONDS = 90.0
"""What one machine wrote, another sees within this on a network file system."""


def write_missing(
    teacher: TeacherPass, work: OpenedCache, progress: SharedProgress
) -> list[BlockId]:
    """Compute and commit what a cache lacks, all ranks together; which blocks these were."""
    ranks = teacher.job.ranks
    cache = work.cache
    missing, left = work.missing, work.left
    progress.total = _rows(cache, missing)
    if cache.encoding.of_anchor:
        _write(teacher, work, my_anchor_runs(left, work.at_once, ranks))
        progress.wait_for_all()
        left = _beside_anchors(teacher, work)
        missing = [*{*missing, *left}]
        progress.total = _rows(cache, missing)
    _write(teacher, work, my_runs(left, work.at_once, ranks))
    teacher.feed.close()
    progress.wait_for_all()
    return missing


def _rows(cache: LogitCache, blocks: Sequence[BlockId]) -> int:
    return sum(cache.grid.length(block) for _, block in blocks)


def _write(teacher: TeacherPass, work: OpenedCache, runs: "Sequence[Run]") -> None:
    """Commit the blocks that have been computed to fit the encoding, then compute and commit those
    of these runs.
    """
    cache = work.cache

    def write(computed: tuple[BlockId, Tensor]) -> None:
        at, logits = computed
        cache.write_block(*at, logits, logits.argmax(1), work.record)

    with BackgroundWriter(write, waiting(teacher.job, work.at_once)).running() as writer:
        for at in [*work.fitted]:
            writer.put((at, work.fitted.pop(at)))
        for run in runs:
            samples = cache.dataset_index[cache.grid.rows(run.block)]
            computed = teacher.finite_of_views(samples, run.views)
            for view in run.views:
                writer.put((BlockId(view, run.block), computed.pop(0)))


def _beside_anchors(teacher: TeacherPass, work: OpenedCache) -> list[BlockId]:
    """What is missing now that the view is whole that others depend on: blocks that were written
    beside an earlier one of it are unmade.
    """
    job = teacher.job
    cache = work.cache
    if job.ranks.world > 1:
        see(cache, [at for at in work.missing if at.view == ANCHOR])

    def look() -> list[BlockId]:
        cache.forget_stale()
        return cache.commits.missing(range(job.config.views))

    left = first_rank_does(job.ranks, look)
    cache.commits.reread()
    return left


def see(cache: LogitCache, blocks: list[BlockId]) -> None:
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


# ---- runs ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Some views of the rows of a block."""

    views: tuple[int, ...]
    block: int


def runs_of(blocks: Sequence[BlockId], at_once: int) -> list[Run]:
    """These (view, block) pairs in runs of up to `at_once` views, those of low views first."""
    views_of: dict[int, list[int]] = {}
    for view, block in sorted(blocks):
        views_of.setdefault(block, []).append(view)
    return sorted(
        Run(tuple(views[start : start + at_once]), block)
        for block, views in views_of.items()
        for start in range(0, len(views), at_once)
    )


def in_runs(blocks: Sequence[BlockId], at_once: int) -> list[BlockId]:
    """These pairs in the order of their runs; a part of it is made of few more runs."""
    return [BlockId(view, run.block) for run in runs_of(blocks, at_once) for view in run.views]


def my_runs(blocks: Sequence[BlockId], at_once: int, ranks: Ranks) -> list[Run]:
    """Those of these blocks that are a rank's: neighbours in their order, so that most views are
    one rank's.
    """
    ordered = in_runs(blocks, at_once)
    return runs_of([ordered[i] for i in ranks.share(len(ordered))], at_once)


def my_anchor_runs(blocks: Sequence[BlockId], at_once: int, ranks: Ranks) -> list[Run]:
    """Of the runs that begin with the view that others depend on those that are a rank's: blocks
    of that view, and what is made of the same decoded images.
    """
    runs = [run for run in runs_of(blocks, at_once) if ANCHOR in run.views]
    return [runs[i] for i in ranks.share(len(runs))]


# ---- writing ---------------------------------------------------------------------------------

Item = TypeVar("Item")


class BackgroundWriter(Generic[Item]):
    """Calls `write` for every item, in order, in another thread. waiting: how many items may wait.

    A failure is raised by the next `put`, or at the end of `running`.
    """

    def __init__(self, write: Callable[[Item], None], waiting: int = 2) -> None:
        self._write = write
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def put(self, item: Item) -> None:
        """Hand over an item; waits while as many others do as may."""
        self._raise()
        self._queue.put(item)

    @contextmanager
    def running(self) -> Iterator["BackgroundWriter[Item]"]:
        """The writer at work; on leaving, everything handed over is written or an error raised."""
        self._thread.start()
        try:
            yield self
        finally:
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:  # after a failure the queue is only emptied
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
