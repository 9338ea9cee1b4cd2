"""Stage one on several ranks, disturbed in every way; see test_cache_by_ranks.py.

    python cache_by_ranks.py RUN OUT ENCODING

RUN is a teacher's run directory, ENCODING the cache's. OUT/whole is made by one process, all other
stores by ranks that are forks of this one, some of them more than once. Prints one JSON object:
scenario -> what became of each rank, and how many blocks were committed then.
"""

import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from helpers import DIGITS, cache_config_of, committed, first
from launch import Launch, Launcher

from stages.cache.commits import CommitLog
from stages.cache.layout import BlockId
from stages.cache.records import Record
from stages.cache_teacher import CacheJob, cache_teacher, prepare
from stages.data import Splits, load_data
from stages.distributed import Ranks, process_group
from stages.errors import ModelError

Disturbance = Callable[[Ranks, int], None]
"""Called on every rank before it commits a block, with how many it has committed."""


def make(job: CacheJob, out: Path, disturb: Disturbance, ranks: Ranks) -> object:
    """One rank of a run; how many blocks all have computed, views, and blocks of its own."""
    own: list[tuple[int, int]] = []
    commit = CommitLog.commit

    def disturbed(log: CommitLog, at: BlockId, record: Record) -> None:
        if log.part == "logits":
            disturb(ranks, len(own))
            own.append((at.view, at.block))
        commit(log, at, record)

    CommitLog.commit = disturbed  # type: ignore[method-assign]  # of this fork
    with process_group(ranks):
        summary = cache_teacher(dataclasses.replace(job, ranks=ranks), out)
    return {"computed": summary.computed_blocks, "views": summary.views, "own": own}


def nothing(ranks: Ranks, committed: int) -> None: ...


def killed(rank: int, ranks: Ranks, committed: int) -> None:
    """After the objects of the third block, before its record."""
    if ranks.rank == rank and committed == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def failing(ranks: Ranks, committed: int) -> None:
    if ranks.rank == 1 and committed == 2:
        raise ModelError("this rank cannot", "do this")


def held_up(ranks: Ranks, committed: int) -> None:
    """Rank 1 never commits its second block."""
    if ranks.rank == 1 and committed == 1:
        time.sleep(600)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def main(run: str, out: Path, encoding: str) -> None:
    changes = {"encoding": encoding, "block_rows": 30, "batch_size": 64}  # 7 blocks a view
    config = cache_config_of(run, views=3, **changes)
    torch.set_num_threads(1)
    digits, launcher, found = load_data(DIGITS), Launcher(), {}
    job = prepare(config, Splits(first(digits.train, 200), first(digits.test, 20)))

    def start(world: int, store: str, disturb: Disturbance = nothing, at_once: int = 1) -> Launch:
        own = dataclasses.replace(
            job, config=msgspec.structs.replace(config, views_at_once=at_once)
        )
        return launcher.start(world, functools.partial(make, own, out / store, disturb))

    def play(
        scenario: str, world: int, store: str, disturb: Disturbance = nothing, at_once: int = 1
    ) -> None:
        ranks = start(world, store, disturb, at_once).outcomes()
        found[scenario] = {"ranks": ranks, "committed": committed(out / store)}

    play("one", 1, "whole")
    play("two", 2, "two")
    play("three", 3, "three")
    for rank in (0, 1):
        play(f"killed-{rank}", 2, f"killed-{rank}", functools.partial(killed, rank))
    play("killed-0, then three", 3, "killed-0")
    play("killed-1, then one", 1, "killed-1")
    play("killed at two views at once", 2, "at-once", functools.partial(killed, 0), at_once=2)
    play("killed, then three views at once", 3, "at-once", at_once=3)
    play("failing", 2, "failed", failing)
    play("failing, then two", 2, "failed")

    began = start(2, "contested", held_up)
    # Rank 0 has done its own and waits; it has also what its encoding was fitted to.
    held = 18 if encoding == "klt-anchored" else 15
    wait_until(lambda: committed(out / "contested") == held)
    play("beside two", 2, "contested")
    os.kill(began.children[0], signal.SIGKILL)
    play("beside one that is left", 1, "contested")
    os.kill(began.children[1], signal.SIGKILL)
    found["contested"] = began.outcomes()
    play("beside none", 2, "contested")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    run, out, encoding = sys.argv[1:]
    main(run, Path(out), encoding)
