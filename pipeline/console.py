"""What a person sees: bars and tables on a terminal, plain lines in a log, rank 0 only."""

import os
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.output import CLOSED, cannot_write, drop_output, visible
from stages.errors import RunError

LOG_SECONDS = 10.0
"""In a log, a running task says how far it is this often."""


class _Output(Rich):
    """Standard output. One whose reader has gone ends the command without a word, one that
    is full with an error.
    """

    def on_broken_pipe(self) -> None:
        drop_output()
        raise SystemExit(CLOSED)

    def print(self, *things: Any, **how: Any) -> None:
        try:
            super().print(*things, **how)
        except OSError as error:
            drop_output()
            raise RunError(*cannot_write(error)) from error


class Console:
    """The `Reporter` of the command line."""

    def __init__(self) -> None:
        _CONSOLES.add(self)
        self._rich = _Output(quiet=os.environ.get("RANK", "0") != "0", soft_wrap=True)
        self._task = ""
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._started = self._spoken = 0.0
        self._offset = 0.0

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        text = visible(text.rstrip("\n"), keep="\n")
        self._rich.print(text, markup=False, highlight=False, emoji=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See `Reporter.table`."""
        self.finish()
        texts = [[visible(str(cell)) for cell in row] for row in rows]
        title, columns = visible(title), [visible(column) for column in columns]
        if self._rich.is_terminal:
            table = Table(*map(escape, columns), title=escape(title), title_justify="left")
            for row in texts:
                table.add_row(*map(escape, row))  # a label like [x] is no markup
            self._rich.print(table)
            return
        widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
        self.say(f"\n{title}")
        for row in ([*columns], ["-" * w for w in widths], *texts):
            self.say("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())

    def progress(self, task: str, done: float, total: float, unit: str) -> None:
        """See `Reporter.progress`."""
        now, task = time.monotonic(), visible(task)
        if task != self._task:
            self.finish()
            self._task, self._started, self._spoken, self._offset = task, now, now, done
        if self._rich.is_terminal:
            self._show_bar(task, done, total, unit)
        elif now - self._spoken >= LOG_SECONDS and done < total:
            self._spoken = now
            rate = (done - self._offset) / (now - self._started) or 1e-9
            self.say(
                f"{task}: {done:,.0f}/{total:,.0f} {unit} ({done / total:.0%}), "
                f"{rate:,.1f} {unit}/s, {duration((total - done) / rate)} left"
            )
        if done >= total:
            self.finish()

    def finish(self) -> None:
        """Take a bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task = None, ""

    def _show_bar(self, task: str, done: float, total: float, unit: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}, {task.fields[rate]}/s"),
                TimeRemainingColumn(),
                console=self._rich,
                transient=True,
            )
            self._bar_task = self._bar.add_task(task, total=total, unit=unit, rate="?")
            self._bar.start()
        assert self._bar_task is not None
        rate = (done - self._offset) / max(1e-9, time.monotonic() - self._started)
        self._bar.update(self._bar_task, completed=done, rate=f"{rate:,.0f}")


_CONSOLES: WeakSet[Console] = WeakSet()


def finish_all() -> None:
    """Take every bar off the terminal."""
    for console in _CONSOLES:
        console.finish()


def counted(count: int, what: str) -> str:
    """1 student, 2 students."""
    return f"{count:,} {what if count == 1 else what + 's'}"


def percent(share: float, digits: int = 2) -> str:
    """A share in [0, 1]: 97.31 %."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def size(count: float) -> str:
    """512 B, 4.2 kB, 1.62 GB, 2.3 TB."""
    units = iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while count >= 999.5:  # what would be shown as 1000
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
