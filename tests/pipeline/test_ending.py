"""How commands end: absurd numbers, outputs that take nothing, signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import forks
import pytest
from helpers import Command, answer_to, committed, job_of

from pipeline.cli import cli
from pipeline.console import Console
from pipeline.ending import KEPT, stopped
from pipeline.options import Numbers
from stages.cache import LogitCache
from stages.cache_teacher import cache_teacher
from stages.rectify import rectify
from stages.settings import RectifyConfig
from stages.verify import verify

ROOT = Path(__file__).parents[2]
ABSURD = ("0", "-1", "1e308", "nan", "inf", str(10**23), "", "x")
NUMBERS = (click.INT.__class__, click.FLOAT.__class__, click.IntRange, click.FloatRange, Numbers)


def numeric_options() -> list[tuple[str, str]]:
    return [
        (name, max(option.opts, key=len))
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, NUMBERS)
        if not option.is_flag
    ]


def needed(command: click.Command) -> list[str]:
    """Words for whatever a command must be given; none of it exists."""
    words = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            choices = getattr(parameter.type, "choices", ["nowhere"])
            words.append(choices[0])
        elif parameter.required:
            words += [parameter.opts[-1], "new"]
        elif "--dataset" in parameter.opts:
            words += ["--dataset", "folder:nowhere"]
    more = {"train-teacher": "--model resnet8", "cache-teacher": "--weights nowhere --views 1"}
    more["train-student"] = "--student resnet8"
    return [*words, *more.get(command.name or "", "").split()]


@pytest.mark.parametrize(("name", "option"), numeric_options())
def test_an_absurd_number_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, name: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-out").mkdir()
    (tmp_path / "demo-out" / "mine").touch()  # a demo never starts
    key = option.strip("-").replace("-", "_")
    (kind,) = [p.type for p in cli.commands[name].params if option in p.opts]
    told = {"nan", "inf", "", "x"}
    told |= {str(10**23)} if isinstance(kind, (click.INT.__class__, click.IntRange)) else set()
    for value in ABSURD:
        answer = command([name, *needed(cli.commands[name]), option, value])
        assert answer.code == 2, value
        assert "Traceback" not in answer.err
        assert sum(line.lower().startswith("error:") for line in answer.err.splitlines()) == 1
        assert value not in told or key in answer.err.replace("-", "_"), (value, answer.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-out"]


@pytest.mark.parametrize("name", ["inspect", "verify", "rectify", "report"])
@pytest.mark.parametrize(("where", "code"), [("/dev/full", 2), ("a closed pipe", 141)])
def test_an_output_that_takes_nothing_is_one_error(
    tiny_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    where: str,
    code: int,
) -> None:
    monkeypatch.chdir(tiny_copy.parent)
    if where == "/dev/full":
        output = open(where, "w")  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        output = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", output)
    answer = answer_to([name, str(tiny_copy)], monkeypatch, capfd)
    output.close()  # the interpreter's own last flush would fail here
    assert answer.code == code
    assert "Traceback" not in answer.err
    assert ("cannot write the output" in answer.err) == (code == 2)
    assert code == 2 or answer.err == ""


def test_help_that_nobody_can_read(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pipeline", "--help"]
        where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, **where)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write the output: No space left on device")


def test_a_folder_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    answer = command("inspect x.zarr")
    os.chdir(tmp_path)
    assert answer.code == 2
    assert "has been deleted" in answer.err


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("name", sorted(cli.commands))
def test_a_stopped_command_says_what_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    name: str,
    number: signal.Signals,
    code: int,
) -> None:
    def work(**_: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(cli.commands[name], "callback", work)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    answer = command([name, *needed(cli.commands[name])])
    assert answer.code == code
    assert signal.getsignal(signal.SIGTERM) is handler
    first, second = answer.err.strip().splitlines()
    assert f"{name} was stopped by " in first
    assert second == KEPT.get(name, second)


def test_what_is_kept_depends_on_what_was_asked_for() -> None:
    commands = set(cli.commands)
    kept = {
        words: stopped(signal.SIGINT, words.split(), commands)[1]
        for words in ("verify c", "verify c --repair", "cache-teacher --dry-run", "cache-teacher")
    }
    assert "as it was" in kept["verify c"]
    assert "Repaired blocks are kept" in kept["verify c --repair"]
    assert "Nothing was written" in kept["cache-teacher --dry-run"]
    assert "Committed blocks are kept" in kept["cache-teacher"]


def stop(process: forks.Started, begun: Callable[[], bool], number: signal.Signals) -> str:
    """Send a signal as soon as something has begun; what was said."""
    until = time.monotonic() + 120
    while not begun() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_rectification_that_is_stopped_lets_go_of_the_cache(
    tiny_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    number: signal.Signals,
    code: int,
) -> None:
    words = ["rectify", str(tiny_copy), "--method", "swap"]
    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", lambda *_: os.kill(os.getpid(), number))
        assert command(words).code == code
    assert command(words).code == 0
    assert verify(tiny_copy).faults == []


@pytest.mark.slow
def test_a_pass_and_a_rectification_that_are_stopped_go_on(
    tmp_path: Path, teacher_run: Path
) -> None:
    """Real processes and real signals; what was committed is kept, and the same work ends whole."""
    out = tmp_path / "c.zarr"
    words = f"cache-teacher --dataset digits --weights {teacher_run} --out {out} --views 6"
    words += " --augment pad-crop:pad=2 --encoding float32 --device cpu --set block_rows=200"

    process = forks.Started(["-m", "pipeline", *words.split()])
    message = stop(process, lambda: committed(out) > 0, signal.SIGINT)
    assert process.returncode == 130, message
    assert message.strip().splitlines()[-1] == KEPT["cache-teacher"]
    cache = LogitCache.open(out)
    missing = len(cache.commits.missing(range(6)))
    assert 0 < missing < 6 * cache.grid.num_blocks
    job = job_of(teacher_run, views=6, encoding="float32", block_rows=200)
    assert cache_teacher(job, out).computed_blocks == missing

    process = forks.Started(["-m", "pipeline", "rectify", str(out)])
    message = stop(process, lambda: committed(out, "rectified/pairwise-T4") > 0, signal.SIGTERM)
    assert process.returncode == 143, message
    assert message.strip().splitlines()[-1] == KEPT["rectify"]
    rectify(out, RectifyConfig())
    assert verify(out).faults == []
