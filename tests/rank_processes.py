"""What ranks make of one another, without torchrun; see test_distributed.py.

    python rank_processes.py

Every scenario runs on three forks of this process, which has imported torch once and serves the
store at which they meet, as torchrun does; in the first scenario rank 0 serves it. Prints one JSON
object: scenario -> for each rank what it returned or raised, and whether it told its error; or the
signal that ended it, negative.
"""

import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from stages.distributed import (
    Ranks,
    SharedCount,
    barrier,
    broadcast_object,
    first_rank_before_others,
    first_rank_does,
    launched_ranks,
    process_group,
    told_once,
    wait_for_all,
)
from stages.errors import ModelError

WORLD = 3
Scenario = Callable[[Ranks], object]


def agree(ranks: Ranks) -> object:
    """All that is had where nothing goes wrong; twice, as a process may open two groups."""
    found = []
    for _ in range(2):
        with process_group(ranks):
            count = SharedCount(ranks)
            value = broadcast_object(ranks, {"rank": ranks.rank})
            worked = first_rank_does(ranks, lambda: os.getpid())
            began = first_rank_before_others(ranks, lambda: time.sleep(0.2) or time.monotonic())
            count.add(10 + ranks.rank)
            seen: list[int] = []
            time.sleep(0.25 * ranks.rank)
            wait_for_all(ranks, functools.partial(look, seen, count))
            barrier(ranks)
            found.append([value, worked == os.getpid(), began, count.add(), len(seen)])
    return found


def look(seen: list[int], count: SharedCount) -> int:
    seen.append(count.add())
    return len(seen)


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
        wait_for_all(ranks, lambda: 0)


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
        wait_for_all(ranks, lambda: 0, timeout=timedelta(seconds=1))


def refuse() -> None:
    raise ModelError("this rank cannot", "do this")


# ---- three forks ----------------------------------------------------------------------------


def outcome(scenario: Scenario) -> dict[str, object]:
    try:
        return {"returned": scenario(launched_ranks())}
    except Exception as error:
        with told_once() as mine:
            time.sleep(0.3 if mine else 0)
            told_at = time.monotonic()
        waited = not mine and time.monotonic() - told_at > 0.1
        return {"raised": type(error).__name__, "text": str(error), "told": mine, "waited": waited}


def on_three_ranks(scenario: Scenario, number: int, port: int, folder: Path) -> list[object]:
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(number)}
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            (folder / str(rank)).write_text(json.dumps(outcome(scenario)))
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [code or json.loads((folder / str(rank)).read_text()) for rank, code in enumerate(codes)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def main() -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost"}
    found = {}

    def play(number: int, scenario: Scenario, port: int) -> None:
        with TemporaryDirectory() as folder:
            found[scenario.__name__] = on_three_ranks(scenario, number, port, Path(folder))

    play(0, agree, free_port())
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for number, scenario in enumerate(
        (
            the_first_cannot,
            the_first_has_a_fault,
            one_cannot_while_others_wait,
            one_cannot_while_others_have_finished,
            all_cannot_before_they_meet,
            one_is_killed,
            one_never_comes,
            one_stands_still,
        )
    ):
        play(number, scenario, server.port)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
