"""How a command ends: its exit code, and what is said where it did not get to its end.

0 done; 1 verify found faults, or a fault of ours with its traceback; 2 an error of the user's or
the surroundings'; 130 and 143 stopped by Ctrl-C and SIGTERM; 141 its output is no longer read.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator

import click

from pipeline.output import CLOSED, cannot_write, drop_output
from pipeline.ranks import tell
from stages.errors import ConfigError, PipelineError, RunError

_SAME = "Run the same command again to go on."
_NOTHING = "Nothing was written."
_UNFINISHED = "Run the same command again."
KEPT = {
    "train-teacher": "Saved epochs are kept. Go on with the same command and --resume.",
    "train-student": "Saved epochs are kept. Go on with the same command and --resume.",
    "cache-teacher": f"Committed blocks are kept. {_SAME}",
    "rectify": f"Rectified blocks are kept. {_SAME}",
    "sweep": f"Finished runs and saved epochs are kept. {_SAME}",
    "verify": f"The cache is as it was. {_UNFINISHED}",
    "report": f"No page was written; an earlier one is as it was. {_UNFINISHED}",
    "evaluate": f"No scores were written; the run is as it was. {_UNFINISHED}",
    "demo": "Run it again with --overwrite: it starts from the beginning.",
}
"""What a stopped command has kept, and how to go on. Of the others: nothing was written."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be."""


def run(command: click.Group) -> int:
    """Run the command line of this process and say what went wrong. Returns the exit code; a fault
    of ours is raised.
    """
    try:
        with _sigterm_raises():
            found = command(prog_name="pipeline", standalone_mode=False)
        code = found if isinstance(found, int) else 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except (PipelineError, click.ClickException) as error:
        code = getattr(error, "exit_code", 2)
        _stop_bars()
        _tell(error)
    except click.Abort as abort:  # click has it from a KeyboardInterrupt
        number = signal.SIGTERM if isinstance(abort.__cause__, Terminated) else signal.SIGINT
        code = 128 + number
        _stop_bars()
        _tell(RunError(*stopped(number, sys.argv[1:], command.commands)))
    except OSError:
        if (code := _flushed(0, "\n")) == 0:  # it is not the output that failed
            raise
    return _flushed(code)


def stopped(number: int, words: list[str], commands: Collection[str]) -> tuple[str, str]:
    """What is said of a command that a signal stopped, by the words of its command line: what
    happened, what is kept and how to go on.
    """
    name = next((word for word in words if word in commands), "")
    kept = KEPT.get(name, f"{_NOTHING} {_UNFINISHED}")
    if "--dry-run" in words:
        kept = f"{_NOTHING} {_UNFINISHED}"
    elif name == "verify" and "--repair" in words:
        kept = f"Repaired blocks are kept. {_SAME}"
    how = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    return f"{name or 'pipeline'} was stopped by {how}", kept


def check_folder() -> None:
    """Raise ConfigError where the current folder has been deleted: no path would mean anything."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            "the current folder has been deleted or cannot be read", "Change to another one (cd)."
        ) from error


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the command as Ctrl-C does: what is half-written is cleaned up."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(error: Exception) -> None:
    with contextlib.suppress(OSError):  # standard error is full or closed: the code is left
        tell(error)


def _stop_bars() -> None:
    """Take progress bars off the terminal, and give it its cursor back."""
    if (console := sys.modules.get("pipeline.console")) is not None:
        with contextlib.suppress(OSError):
            console.finish_all()


def _flushed(code: int, more: str = "") -> int:
    """The exit code, after all that was said has gone out; another one if it could not."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(more)
            sys.stdout.flush()
    except BrokenPipeError:
        code = CLOSED
        drop_output()
    except OSError as error:
        code = 2
        drop_output()
        _tell(RunError(*cannot_write(error)))
    return code
