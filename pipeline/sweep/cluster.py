"""Runs on Dask distributed: processes of one's own, or an existing scheduler.

No more tasks are handed out than there are workers, so that a worker's death is the fault of the
one run it was busy with: that run is tried once more, then told.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask

from pipeline.sweep.grid import Run
from pipeline.sweep.worker import Place, train
from stages.errors import ConfigError

Ended = tuple[Sequence[Run], list[dict[str, Any]] | BaseException]
"""The runs of a task, and their summaries or what stopped them."""

_SETTINGS = {
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.worker-ttl": None,  # a busy worker may be silent for long
    "distributed.worker.daemon": False,  # a DataLoader has processes of its own
    "distributed.comm.timeouts.connect": "60s",
}


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A Dask client of so many processes here; they end with this one, however it ends."""
    from distributed import Client, LocalCluster

    with (
        dask.config.set(_SETTINGS),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL + 1,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        try:
            yield client
        except BaseException:
            # Closing would wait for students at work; their checkpoints are on the disk.
            for nanny in cluster.workers.values():
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(nanny.pid, signal.SIGKILL)
            raise


@contextlib.contextmanager
def existing_cluster(address: str) -> Iterator[Any]:
    """A Dask client of a scheduler whose workers see the same paths. Raises ConfigError."""
    from distributed import Client

    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the Dask scheduler at {address} does not answer: {error}",
            "Start one with `dask scheduler`, or leave --scheduler out.",
        ) from error
    with client:
        if not client.nthreads():
            raise ConfigError(
                f"the Dask scheduler at {address} has no workers",
                f"Start some with `dask worker {address} --nthreads 1`.",
            )
        yield client


def trained(
    client: Any, groups: Sequence[Sequence[Run]], folder: Path, place: Place
) -> Iterator[Ended]:
    """Train every group, one a worker at a time, and yield each when it has ended.

    folder: where the runs go.
    """
    from distributed import as_completed

    waiting = list(reversed(groups))
    busy: dict[str, Sequence[Run]] = {}
    ended = as_completed(loop=client.loop)

    def start() -> None:
        while waiting and len(busy) < max(1, len(client.nthreads())):
            runs = waiting.pop()
            configs, outs = [r.config for r in runs], [str(folder / r.name) for r in runs]
            future = client.submit(train, configs, outs, place, pure=False, key=f"train-{outs[0]}")
            busy[future.key] = runs
            ended.add(future)

    start()
    for future in ended:
        error = future.exception()
        yield busy.pop(future.key), future.result() if error is None else error
        future.release()
        start()
