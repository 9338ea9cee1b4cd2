"""What a sweep would do: --dry-run."""

from collections.abc import Mapping, Sequence

from pipeline.console import Console, counted, duration
from pipeline.sweep.directory import Progress
from pipeline.sweep.estimate import seconds_left
from pipeline.sweep.grid import Run


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
