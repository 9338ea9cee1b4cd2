"""Commands under torchrun: which may run on several ranks, and one message for all of them."""

import os
import sys
import traceback
from typing import NoReturn

import click

from pipeline.output import visible
from stages.errors import ConfigError, PipelineError

NEWLINE = "\n"
ON_SEVERAL_RANKS = ("cache-teacher", "train-student")


def several_ranks() -> bool:
    """Whether this process is one of several; torch is not imported for that."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def check_ranks(command: str | None) -> None:
    """Raise ConfigError if this command would do the same thing on every rank."""
    if several_ranks() and command not in ON_SEVERAL_RANKS:
        raise ConfigError(
            f"{command} runs in one process, this launch has {os.environ['WORLD_SIZE']}",
            f"Run it without torchrun: that is for {' and '.join(ON_SEVERAL_RANKS)}.",
        )


def run_rank(command: click.Group) -> NoReturn:
    """Run a command line as one of several ranks: an error is reported by one of them, and all exit
    with its code; 1 for a fault of ours, which keeps its traceback.
    """
    from stages.distributed import reported_once

    try:
        code = command(prog_name="pipeline", standalone_mode=False)
    except Exception as error:
        with reported_once() as mine:
            if mine:
                tell(error)
        stopped = 130 if isinstance(error, click.Abort) else 1
        code = getattr(error, "exit_code", stopped)  # of ours and of click's
    sys.exit(code)


def tell(error: Exception) -> None:
    """Cause and remedy, what click has to say (Ctrl-C is its Abort), or the traceback."""
    if isinstance(error, PipelineError):
        click.echo(f"error: {visible(error.cause, keep=NEWLINE)}", err=True)
        if error.remedy:
            click.echo(visible(error.remedy, keep=NEWLINE), err=True)
    elif isinstance(error, click.ClickException):
        error.show()
    elif isinstance(error, click.Abort):
        click.echo("error: stopped by Ctrl-C", err=True)
        click.echo("What was saved or committed is kept: the same command goes on.", err=True)
    else:
        traceback.print_exception(error)
