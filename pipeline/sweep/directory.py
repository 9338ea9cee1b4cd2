"""A sweep's folder: which of its runs are new, half-way or finished.

sweep.yaml     the sweep file, as it was given
sweep.json     what every run was asked to be: decides whether a folder is still the same run
results.jsonl  what came of every run that has ended, in the sweep's order
table.md       means over seeds
NAME/          an ordinary run directory for every run
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline.runs import Line, epochs_done
from pipeline.sweep.grid import Run
from stages.cache.lock import exclusive
from stages.cache.storage import cache_around
from stages.errors import RunError, refusals
from stages.files import replace_file
from stages.inputs.run_files import read_config, read_summary
from stages.settings import StudentConfig
from stages.training.history import Summary
from stages.training.run_folder import MADE_FROM, check_same

_FORMAT = "teacher-cache-sweep"


@dataclass(frozen=True)
class Progress:
    """How far a run is. summary: of a finished run, else None. epochs: that it has finished."""

    epochs: int = 0
    summary: Mapping[str, Any] | None = None


class SweepDirectory:
    """Files of one sweep."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / name

    def progress(
        self, runs: Sequence[Run], made_from: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, Progress]:
        """How far each run is, by name; nothing is written. made_from: as `Checked` has it.

        Raises RunError if the folder holds something else, or runs that are not in this sweep.
        """
        if (cache := cache_around(self.path)) is not None:
            raise RunError(f"{self.path} lies inside the cache {cache}", "Choose another out.")
        recorded = self._recorded()
        if recorded is None:
            return {run.name: Progress() for run in runs}
        started = {name for name in recorded if _holds_something(self.run(name))}
        if missing := sorted(started - {run.name for run in runs}):
            raise RunError(
                f"{self.path} holds another sweep: its run {missing[0]} is not in this one",
                f"Choose another out, or delete {self.run(missing[0])}.",
            )
        for run in runs:
            self._check_same(run, recorded.get(run.name), (made_from or {}).get(run.name, {}))
        return {run.name: self._progress(run) for run in runs}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and hold it: a second process on the same sweep is refused."""
        with refusals(RunError, f"cannot make {self.path}", "Choose another out."):
            self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path):
            yield

    def record(self, text: str, runs: Sequence[Run]) -> None:
        """Write down what this sweep is, before its first run starts."""
        asked = {run.name: msgspec.to_builtins(run.config) for run in runs}
        self.write("sweep.json", json.dumps({"format": _FORMAT, "runs": asked}, indent=1) + "\n")
        self.write("sweep.yaml", text)

    def write(self, name: str, text: str) -> None:
        """Replace a file whole."""
        replace_file(self.path / name, text.encode())

    def _recorded(self) -> dict[str, Any] | None:
        """What every run was asked to be; None for a new or empty folder."""
        occupied = _holds_something(self.path)
        try:
            found = json.loads((self.path / "sweep.json").read_bytes())
            if found["format"] == _FORMAT:
                return dict(found["runs"])
        except (OSError, ValueError, KeyError, TypeError):
            if not occupied or self._only_begun():
                return None
        raise RunError(f"{self.path} holds something else than a sweep", "Choose another out.")

    def _only_begun(self) -> bool:
        """Whether a sweep was killed at its very first step."""
        return self.path.is_dir() and {p.name for p in self.path.iterdir()} == {
            "sweep.json.partial"
        }

    def _check_same(self, run: Run, recorded: Any, made_from: Mapping[str, Any]) -> None:
        folder = self.run(run.name)
        if not _holds_something(folder):
            return
        try:  # through the struct: what is new since then has its default
            before = msgspec.to_builtins(msgspec.convert(recorded, StudentConfig))
        except msgspec.ValidationError:
            before = recorded or {}
        now = msgspec.to_builtins(run.config)
        if made_from:
            now[MADE_FROM] = {**made_from, "init": _place(now)}
            before[MADE_FROM] = {**_origins(folder, made_from), "init": _place(before)}
        try:
            check_same(folder, now, before)
        except RunError as error:
            raise RunError(error.cause, "Choose another out, or delete that folder.") from error

    def _progress(self, run: Run) -> Progress:
        folder = self.run(run.name)
        with contextlib.suppress(RunError, ValueError):  # one that is damaged is written again
            if (summary := read_summary(folder)) is not None:
                found = msgspec.convert(summary, Summary)
                if found.epochs >= run.config.train.epochs:
                    return Progress(summary=summary)
        return Progress(epochs=epochs_done(folder) if (folder / "last.pt").exists() else 0)


def _origins(folder: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made from; ours where it does not say."""
    try:
        found = read_config(folder).get(MADE_FROM)
    except RunError:  # reported when it is gone on with
        found = None
    return {key: found.get(key) for key in ours} if isinstance(found, dict) else dict(ours)


def _place(config: Mapping[str, Any]) -> str | None:
    """Where the weights lie that a run starts from, however its path is spelled."""
    init = (config.get("model") or {}).get("init")
    return str(Path(init).resolve()) if init not in (None, "pretrained") else init


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@dataclass(frozen=True)
class Result:
    """A run that has ended: with a summary, or with an error."""

    run: Run
    teacher_top1: float | None
    summary: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def last(self) -> float:
        """Test top-1 of the last epoch, in [0, 1]; of a run that is done."""
        return self._top1("last")

    @property
    def best(self) -> float:
        """Test top-1 of the best epoch, in [0, 1]; of a run that is done."""
        return self._top1("best")

    @property
    def seconds(self) -> float:
        """What an epoch took, without the first, which warms up; of a run that is done."""
        assert self.summary is not None
        return msgspec.convert(self.summary, Summary).seconds_an_epoch

    def _top1(self, epoch: str) -> float:
        assert self.summary is not None
        return float(self.summary[epoch]["test_top1"])

    def line(self) -> dict[str, Any]:
        """Its line of results.jsonl."""
        config = self.run.config
        line = Line(
            name=self.run.name,
            label=self.run.label,
            keys=dict(self.run.keys),
            seed=config.seed.init,
            status="failed" if self.summary is None else "done",
            error=self.error,
            cache=config.cache,
            dataset=config.data.dataset,
            teacher_top1=self.teacher_top1,
        )
        return {**msgspec.to_builtins(line), "summary": self.summary}  # all that a summary has


def as_lines(results: Sequence[Result]) -> str:
    """The whole of results.jsonl."""
    return "".join(json.dumps(result.line()) + "\n" for result in results)
