"""How long a sweep will take, from those of its runs that have finished."""

from collections.abc import Mapping, Sequence
from statistics import mean

from pipeline.sweep.directory import Progress
from pipeline.sweep.grid import Run


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
