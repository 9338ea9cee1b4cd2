"""A sweep: expand, check, train what is not finished, write down what came of it.

    pipeline sweep ablation.yaml --dry-run
    pipeline sweep ablation.yaml --workers 4

Killed? The same command goes on: finished runs are kept, half-way ones resume from their last
epoch, with the bits of a sweep that was never stopped.
"""

import os
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from pipeline.config import trust_named
from pipeline.console import Console
from pipeline.sweep.check import check_runs
from pipeline.sweep.cluster import local_cluster, trained
from pipeline.sweep.directory import SweepDirectory
from pipeline.sweep.file import SweepFile, read_sweep
from pipeline.sweep.grid import Run, expand
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.plan import show_plan
from pipeline.sweep.results import Result
from pipeline.sweep.table import check_baseline, show_results
from pipeline.sweep.together import grouped
from pipeline.sweep.worker import Place
from stages.dask_client import existing_cluster
from stages.errors import ConfigError, RunError
from stages.user_code import trusted, trusting

_MOST_NAMED, _LONGEST = 5, 80
"""Failed runs in the final message, and letters of their errors; results.jsonl has all of them."""


@trusting()
def run_sweep(
    file: str | Path,
    console: Console,
    dry_run: bool = False,
    scheduler: str | None = None,
    **flags: Any,
) -> list[Result]:
    """Train every run of a sweep file that is not finished; return what came of all of them.

    flags: `out`, `workers`. Raises ConfigError or another PipelineError before anything starts,
    RunError at the end if runs failed. Its workers end with it, also where a signal stops it.
    """
    # 1) what is to be done, and whether it can be
    if "RANK" in os.environ:
        raise ConfigError("a sweep has processes of its own", "Start it without torchrun.")
    sweep = read_sweep(file, **flags)
    expanded = expand(sweep)
    for run in expanded:
        trust_named(run.config)
    checked = check_runs(expanded, console)
    check_baseline(checked.runs, sweep.baseline)
    directory = SweepDirectory(sweep.out)
    place = _place(checked.runs, sweep, scheduler)
    workers = sweep.workers * max(1, place.gpus)
    if dry_run:
        show_plan(
            console, checked.runs, directory.progress(checked.runs, checked.made_from), workers
        )
        return []

    # 2) train what is not finished
    with directory.held():
        progress = directory.progress(checked.runs, checked.made_from)
        directory.record(Path(file).read_text(), checked.runs)
        ledger = Ledger(checked, directory, progress, console, sweep.baseline)
        ledger.write()
        groups = grouped(ledger.unfinished, sweep.most_together)
        if groups:
            cluster: AbstractContextManager[Any] = (
                local_cluster(min(workers, len(groups)))
                if scheduler is None
                else existing_cluster(scheduler)
            )
            with cluster as client:
                ledger.workers = len(client.nthreads())
                for runs, outcomes in trained(client, groups, directory.path, place):
                    ledger.add(runs, outcomes)

        # 3) what came of it
        results = ledger.results
        show_results(console, results, sweep.baseline)
    _tell_failures(results)
    return results


def _place(runs: Sequence[Run], sweep: SweepFile, scheduler: str | None) -> Place:
    """Where runs compute: cores are shared out among the processes of this machine."""
    folder = os.getcwd()
    wanted = {run.config.device for run in runs}
    gpus = torch.cuda.device_count() if wanted & {"auto", "cuda"} else 0
    if scheduler is not None:
        return Place(folder, trusted=tuple(trusted()))
    workers = sweep.workers * max(1, gpus)
    threads = max(1, torch.get_num_threads() // workers)
    return Place(folder, threads, gpus, tuple(trusted()))


def _tell_failures(results: Sequence[Result]) -> None:
    failed = [(result.run.name, result.error) for result in results if result.error is not None]
    if not failed:
        return
    named = "; ".join(
        f"{name} ({textwrap.shorten(error, _LONGEST, placeholder=' ...')})"
        for name, error in failed[:_MOST_NAMED]
    )
    more = f"; and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    raise RunError(
        f"{len(failed)} of {len(results)} runs failed: {named}{more}",
        "The results of the others are written. The same command tries the failed ones again.",
    )
