"""What has ended so far: told on the terminal, and kept in results.jsonl and table.md at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.console import Console, duration
from pipeline.sweep.check import Checked
from pipeline.sweep.directory import Progress, SweepDirectory
from pipeline.sweep.estimate import seconds_left
from pipeline.sweep.grid import Run
from pipeline.sweep.results import Result, as_lines
from pipeline.sweep.table import table_markdown
from pipeline.sweep.worker import Failure, Outcome


class Ledger:
    """What has ended so far; kept in results.jsonl after every run."""

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
                result = Result(run, top1, error=outcome.told)
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
