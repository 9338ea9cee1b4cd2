"""A sweep: expand, check, train what is not finished, write down what came of it.

    pipeline sweep ablation.yaml --dry-run
    pipeline sweep ablation.yaml --workers 4

Killed? The same command goes on: finished runs are kept, half-way ones resume from their last
epoch, with the bits of a sweep that was never stopped.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from pipeline.config import trust_named
from pipeline.console import Console, counted, duration
from pipeline.sweep.check import Checked, check_runs, grouped
from pipeline.sweep.cluster import local_cluster, trained
from pipeline.sweep.directory import Progress, Result, SweepDirectory, as_lines
from pipeline.sweep.grid import Run, SweepFile, expand, read_sweep
from pipeline.sweep.table import check_baseline, show_results, table_markdown
from pipeline.sweep.worker import Failure, Outcome, Place
from stages.dask_client import existing_cluster
from stages.errors import ConfigError, RunError
from stages.training.objective import unused_settings
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
    unused = {run.label: unused_settings(run.config.loss) for run in expanded}
    for label, keys in unused.items():
        if keys:
            console.say(f"{label}: the loss ce uses no teacher: {', '.join(keys)} changes nothing")
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


# ---- what has ended --------------------------------------------------------------------------


class Ledger:
    """What has ended so far: shown, and kept in results.jsonl and table.md at once."""

    def __init__(
        self,
        checked: Checked,
        directory: SweepDirectory,
        progress: Mapping[str, Progress],
        console: Console,
        baseline: dict[str, Any] | None,
    ) -> None:
        self._runs, self._top1 = checked.runs, checked.teacher_top1
        self._directory, self._progress = directory, dict(progress)
        self._console, self._baseline = console, baseline
        self.workers = 1
        self._ended = {
            run.name: Result(run, self._top1[run.name], progress[run.name].summary)
            for run in checked.runs
            if progress[run.name].summary is not None
        }
        if self._ended:
            console.say(f"{len(self._ended)} of {len(self._runs)} runs are finished already")

    @property
    def unfinished(self) -> list[Run]:
        """The runs that have not ended, in the sweep's order."""
        return [run for run in self._runs if run.name not in self._ended]

    @property
    def results(self) -> list[Result]:
        """Of every run that has ended, in the sweep's order."""
        return [self._ended[run.name] for run in self._runs if run.name in self._ended]

    def add(self, runs: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
        """A task has ended: write it down, say so."""
        for run, outcome in zip(runs, outcomes, strict=True):
            top1 = self._top1[run.name]
            if isinstance(outcome, Failure):
                result = Result(run, top1, error=outcome.message)
                if outcome.trace:
                    self._directory.write(f"{run.name}.error.txt", outcome.trace)
            else:
                result = Result(run, top1, outcome)
                self._progress[run.name] = Progress(summary=outcome)
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
        left = seconds_left(self.unfinished, self._runs, self._progress, self.workers)
        text = f"{count} {result.run.name}: {result.last:.2%}, {duration(result.seconds)}"
        self._console.say(text + (f", about {duration(left)} left" if left else ""))


def show_plan(
    console: Console, runs: Sequence[Run], progress: Mapping[str, Progress], workers: int
) -> None:
    """Every run, how far it is, and how long it will all take."""
    rows = []
    for run in runs:
        keys = ", ".join(f"{key}={value}" for key, value in run.keys.items())
        seeds = "/".join(map(str, dict.fromkeys(run.seeds)))
        rows.append((run.name, run.label, keys, seeds, _state(run, progress[run.name])))
    console.table(counted(len(runs), "run"), ("run", "label", "keys", "seed", "state"), rows)
    left = seconds_left(
        [run for run in runs if progress[run.name].summary is None], runs, progress, workers
    )
    console.say(
        "estimated time: "
        + ("unknown until the first run has finished" if left is None else duration(left))
        + f", with {counted(workers, 'worker')}"
    )


def _state(run: Run, progress: Progress) -> str:
    if progress.summary is not None:
        return "done"
    if progress.epochs:
        return f"{progress.epochs} of {run.config.train.epochs} epochs"
    return "new"


def seconds_of(run: Run, runs: Sequence[Run], progress: Mapping[str, Progress]) -> float | None:
    """What a whole run takes: the mean of finished runs of the same model and epochs, else of all;
    None until one has finished.
    """
    done = {
        r.name: (r.config.model.architecture, r.config.train.epochs)
        for r in runs
        if progress[r.name].summary is not None
    }
    taken = {name: float((progress[name].summary or {})["train_seconds"]) for name in done}
    kind = run.config.model.architecture, run.config.train.epochs
    same = [taken[name] for name, other in done.items() if other == kind]
    return mean(same or taken.values()) if taken else None


def seconds_left(
    unfinished: Sequence[Run], runs: Sequence[Run], progress: Mapping[str, Progress], workers: int
) -> float | None:
    """What unfinished runs of a sweep still take on so many workers; None until one of its runs has
    finished.
    """
    left = []
    for run in unfinished:
        whole = seconds_of(run, runs, progress)
        if whole is None:
            return None
        left.append(whole * (1 - progress[run.name].epochs / run.config.train.epochs))
    return max(sum(left) / workers, max(left, default=0.0))
