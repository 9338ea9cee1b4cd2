"""A sweep: expand, check, train what is not finished, write down what came of it.

    pipeline sweep ablation.yaml --dry-run
    pipeline sweep ablation.yaml --workers 4

Killed? The same command goes on: finished runs are kept, half-way ones resume from their last
epoch, with the bits of a sweep that was never stopped.
"""

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from pipeline.console import Console, duration
from pipeline.sweep.check import Checked, check_runs
from pipeline.sweep.cluster import existing_cluster, local_cluster, trained
from pipeline.sweep.directory import Progress, SweepDirectory
from pipeline.sweep.estimate import seconds_left
from pipeline.sweep.file import SweepFile, read_sweep
from pipeline.sweep.grid import Run, expand
from pipeline.sweep.results import Result, as_lines
from pipeline.sweep.table import check_baseline, show_results, table_markdown
from pipeline.sweep.together import grouped
from pipeline.sweep.worker import Place
from stages.errors import PipelineError, RunError

_MOST_NAMED = 5
"""Failed runs in the final message; all of them stand in results.jsonl."""


def run_sweep(
    file: str | Path,
    console: Console,
    dry_run: bool = False,
    scheduler: str | None = None,
    **flags: Any,
) -> list[Result]:
    """Train every run of a sweep file that is not finished; return what came of all of them.

    flags: `out`, `workers`. Raises ConfigError or another PipelineError before anything starts,
    RunError at the end if runs failed, or when stopped by SIGTERM or Ctrl+C.
    """
    # 1) what is to be done, and whether it can be
    sweep = read_sweep(file, **flags)
    checked = check_runs(expand(sweep), console)
    check_baseline(checked.runs, sweep.baseline)
    directory = SweepDirectory(sweep.out)
    place = _place(checked.runs, sweep, scheduler)
    workers = sweep.workers * max(1, place.gpus)
    if dry_run:
        show_plan(console, checked.runs, directory.progress(checked.runs), workers)
        return []

    # 2) train what is not finished
    with directory.held(), _stopped_by_signals():
        progress = directory.progress(checked.runs)
        directory.record(Path(file).read_text(), checked.runs)
        ledger = _Ledger(checked, directory, progress, console, workers, sweep.baseline)
        ledger.write()
        groups = grouped(ledger.unfinished, sweep.most_together)
        if groups:
            cluster: AbstractContextManager[Any] = (
                local_cluster(min(workers, len(groups)))
                if scheduler is None
                else existing_cluster(scheduler)
            )
            with cluster as client:
                for runs, outcome in trained(client, groups, directory.path, place):
                    ledger.add(runs, outcome)

        # 3) what came of it
        results = ledger.results
        show_results(console, results, sweep.baseline)
    _tell_failures(results)
    return results


class _Ledger:
    """What has ended so far; kept in results.jsonl after every run."""

    def __init__(
        self,
        checked: Checked,
        directory: SweepDirectory,
        progress: Mapping[str, Progress],
        console: Console,
        workers: int,
        baseline: dict[str, Any] | None,
    ) -> None:
        self._runs, self._top1 = checked.runs, checked.teacher_top1
        self._directory, self._progress = directory, dict(progress)
        self._console, self._workers, self._baseline = console, workers, baseline
        self._ended = {
            run.name: Result(run, self._top1[run.name], progress[run.name].summary)
            for run in checked.runs
            if progress[run.name].summary is not None
        }
        if self._ended:
            console.say(f"{len(self._ended)} of {len(self._runs)} runs are finished already")

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self._runs if run.name not in self._ended]

    @property
    def results(self) -> list[Result]:
        """Of every run that has ended, in the sweep's order."""
        return [self._ended[run.name] for run in self._runs if run.name in self._ended]

    def add(self, runs: Sequence[Run], outcome: list[dict[str, Any]] | BaseException) -> None:
        """A task has ended: write it down, say so."""
        for i, run in enumerate(runs):
            top1 = self._top1[run.name]
            if isinstance(outcome, BaseException):
                result = Result(run, top1, error=told(outcome))
                self._keep_traceback(run, outcome)
            else:
                result = Result(run, top1, outcome[i])
                self._progress[run.name] = Progress(summary=outcome[i])
            self._ended[run.name] = result
            self._say(result)
        self.write()

    def write(self) -> None:
        """results.jsonl and table.md, whole."""
        self._directory.write("results.jsonl", as_lines(self.results))
        self._directory.write("table.md", table_markdown(self.results, self._baseline))

    def _say(self, result: Result) -> None:
        count = f"[{len(self._ended)}/{len(self._runs)}]"
        if result.error is not None:
            self._console.say(f"{count} {result.run.name}: failed: {result.error}")
            return
        left = seconds_left(self.unfinished, self._runs, self._progress, self._workers)
        text = f"{count} {result.run.name}: {result.last:.2%}, {duration(result.seconds)}"
        self._console.say(text + (f", about {duration(left)} left" if left else ""))

    def _keep_traceback(self, run: Run, error: BaseException) -> None:
        if not isinstance(error, PipelineError):
            text = "".join(traceback.format_exception(error))
            self._directory.write(f"{run.name}.error.txt", text)


def told(error: BaseException) -> str:
    """An error in one line."""
    from distributed.scheduler import KilledWorker

    if isinstance(error, PipelineError):
        return " ".join([error.cause, error.remedy]).strip()
    if isinstance(error, KilledWorker):
        return "its worker process died twice: killed, out of memory, or crashed"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _place(runs: Sequence[Run], sweep: SweepFile, scheduler: str | None) -> Place:
    """Where runs compute: cores are shared out among the processes of this machine."""
    folder = os.getcwd()
    wanted = {run.config.device for run in runs}
    gpus = torch.cuda.device_count() if wanted & {"auto", "cuda"} else 0
    if scheduler is not None:
        return Place(folder)
    workers = sweep.workers * max(1, gpus)
    return Place(folder, max(1, torch.get_num_threads() // workers), gpus)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl+C end the workers and become a RunError; a second one is not waited for."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise RunError(
            f"the sweep was stopped by {error.args[0] if error.args else 'Ctrl+C'}",
            "Go on with the same command.",
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


# ---- what a person sees ---------------------------------------------------------------------


def show_plan(
    console: Console, runs: Sequence[Run], progress: Mapping[str, Progress], workers: int
) -> None:
    """Every run, how far it is, and how long it will all take."""
    rows = []
    for run in runs:
        keys = ", ".join(f"{key}={value}" for key, value in run.keys.items())
        seeds = "/".join(map(str, dict.fromkeys(run.seeds)))
        rows.append((run.name, run.label, keys, seeds, _state(run, progress[run.name])))
    console.table(f"{len(runs)} runs", ("run", "label", "keys", "seed", "state"), rows)
    left = seconds_left(
        [run for run in runs if progress[run.name].summary is None], runs, progress, workers
    )
    console.say(
        "estimated time: "
        + ("unknown until the first run has finished" if left is None else duration(left))
        + f", with {workers} worker{'s' * (workers > 1)}"
    )


def _state(run: Run, progress: Progress) -> str:
    if progress.summary is not None:
        return "done"
    if progress.epochs:
        return f"{progress.epochs} of {run.config.train.epochs} epochs"
    return "new"


def _tell_failures(results: Sequence[Result]) -> None:
    failed = [result for result in results if result.error is not None]
    if not failed:
        return
    named = "; ".join(f"{result.run.name} ({result.error})" for result in failed[:_MOST_NAMED])
    more = f"; and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    raise RunError(
        f"{len(failed)} of {len(results)} runs failed: {named}{more}",
        "The results of the others are written. The same command tries the failed ones again.",
    )
