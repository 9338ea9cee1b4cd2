"""What ranks make of one another when one fails, is killed or never comes; see test_distributed.py.

    python rank_processes.py

Every scenario runs on three ranks that are forks of this process. In the first, rank 0 serves the
store at which they meet. Prints one JSON object: scenario -> what became of each rank.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta

from launch import Launcher

from stages.distributed import (
    Ranks,
    SharedProgress,
    barrier,
    broadcast_object,
    first_rank_does,
    first_rank_first,
    process_group,
)
from stages.errors import ModelError

WORLD = 3


def agree(ranks: Ranks) -> object:
    """All that is had where nothing goes wrong; twice, as a process may open two groups."""
    found = []
    for _ in range(2):
        with process_group(ranks):
            seen: list[int] = []
            count = SharedProgress(ranks, lambda done, total, seen=seen: seen.append(done))
            value = broadcast_object(ranks, {"rank": ranks.rank})
            worked = first_rank_does(ranks, lambda: os.getpid())
            with first_rank_first(ranks):
                time.sleep(0.2)
                began = time.monotonic()
            count.add(10 + ranks.rank)
            time.sleep(0.25 * ranks.rank)
            count.wait_for_all()
            barrier(ranks)
            found.append([value, worked == os.getpid(), began, count.add(), len(seen)])
    return found


def the_first_cannot(ranks: Ranks) -> object:
    with process_group(ranks):
        return first_rank_does(ranks, lambda: refuse())


def the_first_has_a_fault(ranks: Ranks) -> object:
    with process_group(ranks):
        return first_rank_does(ranks, lambda: 1 // 0)


def one_cannot_while_others_wait(ranks: Ranks) -> None:
    with process_group(ranks):
        if ranks.rank == 2:
            refuse()
        barrier(ranks)


def one_cannot_while_others_have_finished(ranks: Ranks) -> None:
    with process_group(ranks):
        if ranks.rank == 2:
            time.sleep(0.3)
            refuse()
        SharedProgress(ranks).wait_for_all()


def all_cannot_before_they_meet(ranks: Ranks) -> None:
    refuse()


def one_is_killed(ranks: Ranks) -> object:
    with process_group(ranks):
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return broadcast_object(ranks, None) or barrier(ranks)


def one_never_comes(ranks: Ranks) -> None:
    with process_group(ranks, timeout=timedelta(seconds=1)):
        if ranks.rank == 1:
            time.sleep(2)
        barrier(ranks)


def one_stands_still(ranks: Ranks) -> None:
    with process_group(ranks):
        if ranks.rank == 1:
            time.sleep(2)
        SharedProgress(ranks).wait_for_all(timeout=timedelta(seconds=1))


def refuse() -> None:
    raise ModelError("this rank cannot", "do this")


def main() -> None:
    launcher = Launcher()
    found = {"agree": launcher.start(WORLD, agree, served=False).outcomes()}
    for scenario in (
        the_first_cannot,
        the_first_has_a_fault,
        one_cannot_while_others_wait,
        one_cannot_while_others_have_finished,
        all_cannot_before_they_meet,
    ):
        found[scenario.__name__] = launcher.start(WORLD, scenario).outcomes(stop=False)
    waits = (one_is_killed, one_never_comes, one_stands_still)
    launches = [launcher.start(WORLD, scenario) for scenario in waits]  # beside one another
    for scenario, launch in zip(waits, launches, strict=True):
        found[scenario.__name__] = launch.outcomes(stop=False)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
