"""What run directories and a sweep's results.jsonl say about students and teachers."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import flat
from stages.errors import RunError
from stages.inputs.run_files import check_file, read_config, read_summary
from stages.objectives.losses import DEFINITIONS
from stages.training.history import Summary

REQUIRED = ("loss", "test_top1", "seconds")
"""What every line of metrics.jsonl has."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); std is None for a single number."""

    mean: float
    std: float | None
    n: int

    def scaled(self, factor: float) -> "Spread":
        """The same in another unit."""
        return Spread(factor * self.mean, self.std and factor * self.std, self.n)


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of numbers, one at least."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of results.jsonl. name: the run's folder under the sweep's. label: its group."""

    name: str
    label: str
    keys: dict[str, Any] = {}
    seed: int | None = None
    status: str
    error: str | None = None
    cache: str | None = None
    dataset: str | None = None
    teacher_top1: float | None = None
    summary: Summary | None = None


@dataclass(frozen=True)
class Run:
    """A finished run.

    config: by dotted keys, as config.yaml has it. history: its epochs, as metrics.jsonl has them;
    empty where the folder is gone. group: (sweep, label), None for a run outside a sweep. whole:
    whether config is all of it, and not only what a sweep's results.jsonl tells.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...]
    summary: Summary
    group: tuple[str, str] | None = None
    teacher_top1: float | None = None
    whole: bool = True

    @property
    def dataset(self) -> str:
        """The dataset, as the settings name it."""
        return str(self.config.get("data.dataset"))

    @property
    def cache(self) -> str | None:
        """The first cache that it learned from; None for a run of train-teacher."""
        found = self.config.get("cache")
        return None if found is None else str(found)

    @property
    def seeds(self) -> tuple[Any, Any]:
        """(seed.data, seed.init)."""
        return self.config.get("seed.data", 0), self.config.get("seed.init", 0)

    @property
    def caches(self) -> list[str]:
        """Of every teacher that it learned from."""
        found = [self.config.get("cache"), *(self.config.get("also") or ())]
        return [str(cache) for cache in found if cache is not None]

    @property
    def teacher_passes(self) -> int:
        """How often each of its teachers would have seen the training set, had it been there."""
        if not self.uses_teacher:
            return 0
        definition = DEFINITIONS.get(str(self.config.get("loss.name")))
        return self.summary.epochs * (definition.views if definition else 1)

    @property
    def uses_teacher(self) -> bool:
        """Whether online it would have needed the teacher in every epoch."""
        return self.kind == "student" and self.config.get("loss.name") != "ce"


@dataclass(frozen=True)
class LeftOut:
    """Something that was found and says too little to be counted; why, in words."""

    name: str
    status: str
    why: str


def read_run(path: Path, name: str) -> Run | LeftOut:
    """A run directory, by the name it has on the page."""
    try:
        config = flat(read_config(path))
    except RunError as error:
        return LeftOut(name, "unreadable", error.cause)
    file, metrics = path / "summary.json", path / "metrics.jsonl"
    if not file.exists():
        done = epochs_done(path)
        planned = config.get("train.epochs", "?")
        return LeftOut(name, "unfinished", f"{done} of {planned} epochs are done")
    try:
        read_summary(path)
        for kept in ("config.yaml", metrics.name):
            check_file(path, kept)
        summary = msgspec.json.decode(file.read_bytes(), type=Summary)
        if summary.last.test_top1 is None:
            return LeftOut(name, "not measured", "it has no test split")
        history = _history(metrics)
    except RunError as error:
        return LeftOut(name, "unreadable", error.cause)
    except _UnreadableError as error:
        return LeftOut(name, "unreadable", str(error))
    except (OSError, msgspec.DecodeError) as error:
        return LeftOut(name, "unreadable", f"summary.json: {_first_line(error)}")
    if len(history) != summary.epochs:
        why = f"metrics.jsonl has {len(history)} epochs, summary.json tells of {summary.epochs}"
        return LeftOut(name, "unreadable", why)
    config |= _views(config, history)
    return Run(name, str(config.get("kind", "student")), config, tuple(history), summary)


def epochs_done(folder: Path) -> int:
    """How many epochs a run has finished, by its metrics.jsonl; 0 where that cannot be read."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _views(config: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many views of its cache a run that took all of them had: the cache may have grown since.
    Nothing where it had more views than epochs.
    """
    seen = {line["view"] for line in history if "view" in line}
    if "cache" not in config or config.get("views") is not None or len(seen) == len(history):
        return {}
    definition = DEFINITIONS.get(str(config.get("loss.name")))
    return {"views": len(seen) * (definition.views if definition else 1)} if seen else {}


def read_sweep(path: Path, name: str) -> Iterator[Run | LeftOut]:
    """Every run of a sweep, as results.jsonl and the run's folder have it.

    A run that was tried again has several lines: the last one holds.
    """
    lines: dict[str, Line] = {}
    try:
        texts = _lines(path / "results.jsonl")
    except _UnreadableError as error:
        yield LeftOut(name, "unreadable", str(error))
        return
    for number, text in enumerate(texts, start=1):
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as error:
            why = f"line {number}: {_first_line(error)}"
            yield LeftOut(f"{name}/results.jsonl", "unreadable", why)
            continue
        lines.pop(line.name, None)
        lines[line.name] = line
    for line in lines.values():
        yield _run_of(line, path / line.name, name)


def _run_of(line: Line, folder: Path, sweep: str) -> Run | LeftOut:
    name = f"{sweep}/{line.name}"
    if line.status != "done" or line.summary is None:
        return LeftOut(name, line.status, line.error or "no reason is given")
    read = read_run(folder, name)
    if isinstance(read, Run):
        kind, config, history = read.kind, dict(read.config), read.history
    else:  # the numbers stand in results.jsonl, the curves are lost
        kind, config, history = "student", {"seed.data": line.seed, "seed.init": line.seed}, ()
        config |= line.keys | {"train.epochs": line.summary.epochs}
    known = {"cache": line.cache, "data.dataset": line.dataset}
    config |= {key: value for key, value in known.items() if value is not None}
    return Run(
        name=name,
        kind=kind,
        config=config,
        history=history,
        summary=line.summary,
        group=(sweep, line.label),
        teacher_top1=line.teacher_top1,
        whole=isinstance(read, Run),
    )


class _UnreadableError(Exception):
    """A file of a run that says something else than it should."""


def _history(path: Path) -> list[Mapping[str, float]]:
    """The epochs of metrics.jsonl: every number of each line."""
    history: list[Mapping[str, float]] = []
    for number, text in enumerate(_lines(path), start=1):
        try:
            line = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise _UnreadableError(f"metrics.jsonl, line {number}: {_first_line(error)}") from error
        numbers = {key: float(v) for key, v in line.items() if isinstance(v, (int, float))}
        if missing := [key for key in REQUIRED if key not in numbers]:
            raise _UnreadableError(f"metrics.jsonl, line {number}: no {missing[0]}")
        history.append(numbers)
    return history


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _UnreadableError(f"{path.name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
