"""What a worker process does: one run, or one group of runs, at a time.

Data are loaded once in each process and shared by its students. What comes back is small: a run's
directory holds what came of it.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from stages.cache import LogitCache
from stages.data import Splits, load_data, skips_of
from stages.errors import PipelineError, RunError
from stages.reporting import Silent
from stages.settings import DataSettings, StudentConfig
from stages.train_student import train_student, train_together
from stages.training.run_folder import held
from stages.user_code import trusting

_ONE_AT_A_TIME = threading.Lock()
"""First weights come from torch's global generator: students of one process take turns, also where
an existing cluster gives its workers several threads."""
_LOCK_TIMEOUT = 60.0
"""Seconds to wait for a task of an earlier sweep that still trains a run: it stops when it sees
that its sweep was cancelled."""
_POLL_SECONDS = 2.0
"""Between two looks at whether a task was cancelled."""


@dataclass(frozen=True)
class Place:
    """Where a task runs. folder: what relative paths start from. threads: of torch, None to leave
    them as they are. gpus: worker i uses GPU i % gpus; 0 to leave the choice to torch. trusted: the
    modules that were named on the command line of the sweep.
    """

    folder: str
    threads: int | None = None
    gpus: int = 0
    trusted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a run failed, in one line. trace: of an error that is a fault of ours, else empty."""

    message: str
    trace: str = ""


Outcome = dict[str, Any] | Failure
"""The summary of a run, or why there is none."""


def train(configs: Sequence[StudentConfig], outs: Sequence[str], place: Place) -> list[Outcome]:
    """Train the runs of one task, going on where they were left."""
    if not Path(place.folder).is_dir():
        return [Failure(f"{place.folder} is not there: workers must see the same paths")] * len(
            outs
        )
    with _ONE_AT_A_TIME, contextlib.chdir(place.folder), trusting(*place.trusted):
        settle(place)
        watch = Watch()
        try:
            for out in outs:
                wait_for(Path(out))
            caches = {path for c in configs for path in (c.cache, *c.also)}
            splits = splits_of(configs[0].data, tuple(sorted(caches)), place.folder)
        except Exception as error:
            return [failure(error)] * len(outs)
        if len(configs) > 1:
            # Where a group fails its runs are trained one by one: the one at fault is named.
            with contextlib.suppress(Exception):
                found = train_together(configs, outs, resume=True, splits=splits, reporter=watch)
                return [failure(o) if isinstance(o, PipelineError) else o for o in found]
        return [_one(*run, splits, watch) for run in zip(configs, outs, strict=True)]


def _one(config: StudentConfig, out: str, splits: Splits, watch: "Watch") -> Outcome:
    try:
        return train_student(config, out, resume=True, splits=splits, reporter=watch)
    except Exception as error:
        return failure(error)


def failure(error: BaseException) -> Failure:
    """An error as it is reported."""
    if isinstance(error, PipelineError):
        sentences = (text.rstrip(".") for text in (error.cause, error.remedy) if text)
        return Failure(" ".join(". ".join(sentences).split()))
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return Failure(message, "".join(traceback.format_exception(error)))


@lru_cache(maxsize=2)
def splits_of(data: DataSettings, caches: tuple[str, ...], folder: str) -> Splits:
    """The images of this process's students, without those that their caches leave out. folder:
    where relative paths start.
    """
    return load_data(data, skips_of(LogitCache.open(path).skips for path in caches))


def settle(place: Place) -> None:
    """Threads and device of this thread, and where module:callable is looked up."""
    if place.folder not in sys.path:
        sys.path.append(place.folder)  # after the libraries
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    if place.gpus:
        torch.cuda.set_device(_worker_number() % place.gpus)


def _worker_number() -> int:
    """Which worker of the cluster this is; 0 where workers have names instead of numbers."""
    from distributed import get_worker

    name = str(get_worker().name)
    return int(name) if name.isdecimal() else 0


# ---- one writer a run -----------------------------------------------------------------------


class Watch(Silent):
    """A reporter that stops a cancelled run: a thread cannot be stopped from outside, and workers
    of a cluster outlive the sweep that gave them work.
    """

    def __init__(self) -> None:
        from distributed import get_worker

        self._worker, self._looked = None, time.monotonic()
        with contextlib.suppress(ValueError):  # not on a worker
            self._worker = get_worker()
            self._task = self._worker.get_current_task()

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if self._worker is None or now - self._looked < _POLL_SECONDS:
            return
        self._looked = now
        state = self._worker.state.tasks.get(self._task)
        if state is None or state.state in ("cancelled", "released", "forgotten"):
            raise RunError("its sweep was cancelled", "Go on with the same command.")


def wait_for(folder: Path) -> None:
    """Wait until no other task writes to a run's folder: those of an earlier sweep end.

    Raises RunError if it is held for longer than `_LOCK_TIMEOUT`.
    """
    give_up = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            held(folder).release()
            return
        except RunError as error:
            if not isinstance(error.__context__, BlockingIOError) or time.monotonic() > give_up:
                raise
        time.sleep(0.5)
