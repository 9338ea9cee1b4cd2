"""What a worker process does: one run, or one group of runs, at a time.

Data are loaded once in each process and shared by its students. Nothing here returns tensors: a
run's directory holds what came of it.
"""

import contextlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.sweep.directory import clear_stillborn
from stages.train_student import StudentConfig, train_student
from stages.training.config import DataSettings
from stages.training.setup import Splits, load_data

_ONE_AT_A_TIME = threading.Lock()
"""First weights come from torch's global generator: students of one process take turns, also where
an existing cluster gives its workers several threads."""


@dataclass(frozen=True)
class Place:
    """Where a task runs. folder: what relative paths start from. threads: of torch, None to leave
    them as they are. gpus: worker i uses GPU i % gpus; 0 to leave the choice to torch.
    """

    folder: str
    threads: int | None = None
    gpus: int = 0


def train(
    configs: Sequence[StudentConfig], outs: Sequence[str], place: Place
) -> list[dict[str, Any]]:
    """Train runs that are one task, going on where they were left; return their summaries."""
    with _ONE_AT_A_TIME, contextlib.chdir(place.folder):
        settle(place)
        for out in outs:
            clear_stillborn(Path(out))
        splits = splits_of(configs[0].data, place.folder)
        if len(configs) == 1:
            return [train_student(configs[0], outs[0], resume=True, splits=splits)]
        from stages.train_student import train_together  # type: ignore[attr-defined]

        summaries: list[dict[str, Any]]
        summaries = train_together(configs, outs, resume=True, splits=splits)
        return summaries


@lru_cache(maxsize=2)
def splits_of(data: DataSettings, folder: str) -> Splits:
    """The images of this process's students. folder: where relative paths start."""
    return load_data(data)


def settle(place: Place) -> None:
    """Threads and device of this thread, and where module:callable is looked up."""
    if place.folder not in sys.path:
        sys.path.insert(0, place.folder)
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    if place.gpus:
        torch.cuda.set_device(worker_number() % place.gpus)


def worker_number() -> int:
    """Which worker of the cluster this is; 0 where workers have names instead of numbers."""
    from distributed import get_worker

    name = str(get_worker().name)
    return int(name) if name.isdecimal() else 0
