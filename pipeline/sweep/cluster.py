"""Runs on Dask distributed: processes of one's own, or an existing scheduler.

No more tasks are handed out than there are workers, so that a worker's death is the fault of the
one run it was busy with: that run is tried once more, then reported.
"""

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import dask

from pipeline.sweep.grid import Run
from pipeline.sweep.worker import Failure, Outcome, Place, failure, train
from stages.errors import RunError

_SETTINGS = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-ttl": None,  # a busy worker may be silent for long
    "distributed.worker.daemon": False,  # a DataLoader has processes of its own
    "distributed.comm.timeouts.connect": "60s",
    # After 15 s the cluster would forget a worker that is started again: on a busy machine that
    # takes longer, and its task would wait for ever.
    "distributed.deploy.lost-worker-timeout": "1 day",
}
_POLL_SECONDS = 0.1
"""Between two looks at whether a task has ended, and whether there still are workers."""


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A Dask client of so many processes here; they end with this one, however it ends."""
    before = set(multiprocessing.active_children())
    with contextlib.ExitStack() as stack:
        try:
            yield _started(workers, stack)
        except BaseException:
            # Closing would wait for students at work; their checkpoints are on the disk.
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise


def _started(workers: int, stack: contextlib.ExitStack) -> Any:
    from distributed import Client, LocalCluster

    stack.enter_context(dask.config.set(_SETTINGS))
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL + 1,
        )
        return stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{workers} worker processes cannot be started: {error}", "Try fewer --workers."
        ) from error


def trained(
    client: Any, groups: Sequence[Sequence[Run]], folder: Path, place: Place
) -> Iterator[tuple[Sequence[Run], list[Outcome]]]:
    """Train every group, one a worker at a time; yield each with its outcomes when it has ended.

    folder: where the runs go. Raises RunError if the scheduler or all worker processes go away.
    """
    from distributed import as_completed

    waiting = list(reversed(groups))
    busy: dict[str, Sequence[Run]] = {}
    ended = as_completed(loop=client.loop)
    while waiting or busy:
        with _scheduler_there():
            while waiting and len(busy) < max(1, len(client.nthreads())):
                runs = waiting.pop()
                configs = [run.config for run in runs]
                outs = [str(folder / run.name) for run in runs]
                future = client.submit(train, configs, outs, place, pure=False)
                busy[future.key] = runs
                ended.add(future)
            while not ended.has_ready():
                _check_workers(client)
                time.sleep(_POLL_SECONDS)
            future = next(ended)
            runs = busy.pop(future.key)
            error = CancelledError() if future.cancelled() else future.exception()
            if isinstance(error, CancelledError):
                raise error
            outcomes = future.result() if error is None else [_failure(error)] * len(runs)
            future.release()
        yield runs, outcomes


def _check_workers(client: Any) -> None:
    """Raise RunError if the cluster of `local_cluster` has given up all of its processes."""
    if client.cluster is not None and not client.cluster.workers:
        raise RunError("all worker processes are gone", "Go on with the same command.")


@contextlib.contextmanager
def _scheduler_there() -> Iterator[None]:
    """Raise RunError where the scheduler does not answer any more."""
    try:
        yield
    except (OSError, CancelledError) as error:
        raise RunError(
            "the Dask scheduler went away", "Start it again, then go on with the same command."
        ) from error


def _failure(error: BaseException) -> Failure:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return Failure("its worker process died again: killed, out of memory, or crashed")
    return failure(error)
