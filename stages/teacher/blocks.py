"""Which blocks each rank of stage one computes and writes, and in which order.

Where views depend on one of them, its blocks are written first, by whichever ranks, and with them
what is made of the same decoded images; the rest once all of them are there.
"""

import time
from dataclasses import dataclass

from torch import Tensor

from stages.cache import LogitCache
from stages.cache.blocks import BackgroundWriter
from stages.cache.commits import Record
from stages.cache.layout import ANCHOR, BlockId
from stages.distributed import Ranks, first_rank_does
from stages.errors import CacheError
from stages.teacher.job import CacheJob
from stages.teacher.logits import TeacherPass
from stages.teacher.runs import anchor_runs, runs_of, waiting
from stages.teacher.store import Blocks

_SHOWN_SECONDS = 90.0
"""What one machine wrote, another sees within this on a network file system."""


def share(missing: list[BlockId], fitted: list[BlockId], ranks: Ranks) -> list[BlockId]:
    """The missing (view, block) pairs that are this rank's to write: a run of them, so that most
    views are one rank's. Those that fitting the encoding computed are with the first rank.
    """
    rest = [pair for pair in missing if pair not in fitted]
    mine = [rest[i] for i in ranks.share(len(rest))]
    return [*fitted, *mine] if ranks.first else mine


@dataclass(frozen=True)
class BlockWriter:
    """What this rank computes and writes. fitted: those that have been computed already."""

    teacher: TeacherPass
    cache: LogitCache
    record: Record
    fitted: Blocks
    at_once: int

    def write(self, mine: list[BlockId]) -> None:
        """Compute these blocks and commit them; of the same rows those of low views first."""
        job, cache = self.teacher.job, self.cache
        there = [at for at in mine if at in self.fitted]
        with BackgroundWriter(self._write, waiting(job, self.at_once)).running() as writer:
            for at in there:
                writer.put((at, self.fitted.pop(at)))
            for run in runs_of([at for at in mine if at not in there], self.at_once):
                samples = cache.dataset_index[cache.grid.rows(run.block)]
                computed = self.teacher.finite_of_views(samples, run.views)
                for view in run.views:
                    writer.put((BlockId(view, run.block), computed.pop(0)))

    def _write(self, computed: tuple[BlockId, Tensor]) -> None:
        at, logits = computed
        self.cache.write_block(*at, logits, logits.argmax(1), self.record)


def with_anchors(
    missing: list[BlockId], there: list[BlockId], blocks: BlockWriter
) -> list[BlockId]:
    """Of what is missing this rank's blocks of the view that others depend on, and those that are
    made of the same decoded images.
    """
    ranks = blocks.teacher.job.ranks
    runs = anchor_runs([at for at in missing if at not in there], blocks.at_once)
    mine = [at for anchor in share([*runs], [], ranks) for at in runs[anchor]]
    return [*there, *mine] if ranks.first else mine


def beside_anchors(cache: LogitCache, missing: list[BlockId], job: CacheJob) -> list[BlockId]:
    """What is missing now that the view is whole that others depend on: blocks that were written
    beside an earlier one of it are unmade.
    """
    if job.ranks.world > 1:
        see(cache, [at for at in missing if at.view == ANCHOR])

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
