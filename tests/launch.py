"""What torchrun does, without its start-up: forks that know their rank, and where they meet.

Nothing may have touched Zarr before: threads do not live on in a fork.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist

from stages.distributed import Ranks, launched_ranks, reported_once

Scenario = Callable[[Ranks], object]


@dataclass(frozen=True)
class Launch:
    """The ranks of one launch, as process ids."""

    children: list[int]
    folder: Path

    def outcomes(self, stop: bool = True) -> list[Any]:
        """Of every rank, once all have ended: what `_outcome` says, or the signal that ended it,
        negative. stop: the others, once one was killed, as torchrun does.
        """
        codes: dict[int, int] = {}
        while running := [child for child in self.children if child not in codes]:
            time.sleep(0.01)
            for child in running:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if stop and any(codes.values()):
                for child in set(running) - set(codes):
                    os.kill(child, signal.SIGTERM)
        files = [self.folder / str(rank) for rank in range(len(self.children))]
        return [
            codes[pid] or json.loads(file.read_text())
            for pid, file in zip(self.children, files, strict=True)
        ]


class Launcher:
    """Starts launches, one after another or beside one another."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._port = _serve()
        self._launches = 0

    def start(self, world: int, scenario: Scenario, served: bool = True) -> Launch:
        """So many ranks that run a scenario. served: not by rank 0, where they meet."""
        folder = Path(mkdtemp(prefix="launch-"))
        self._launches += 1
        environment = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._port if served else _free_port()),
            "TORCHELASTIC_USE_AGENT_STORE": str(served),
            "TORCHELASTIC_RESTART_COUNT": str(self._launches),  # their own place in the store
        }
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                try:
                    (folder / str(rank)).write_text(json.dumps(_outcome(scenario)))
                finally:
                    os._exit(0)  # no clean-up of what belongs to the parent
            children.append(child)
        return Launch(children, folder)


def _outcome(scenario: Scenario) -> dict[str, object]:
    try:
        return {"returned": scenario(launched_ranks())}
    except Exception as error:
        with reported_once() as mine:
            time.sleep(0.3 if mine else 0)
            reported_at = time.monotonic()
        waited = not mine and time.monotonic() - reported_at > 0.1
        return {
            "raised": type(error).__name__,
            "text": str(error),
            "reported": mine,
            "waited": waited,
        }


def _serve() -> int:
    """The port of a store in a process of its own, which ends with this one: what forks later must
    not have threads.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)
    return int(os.read(reading, 16))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
