"""Parts of a measurement one after another, in bounds: what fails or hangs costs only itself.

A part runs in a process of its own making, which later parts share as long as all goes well: after
an error, which can leave a GPU unusable to its process, and after a time limit the next part has a
fresh one. Every result is written to a file as soon as it is known, so that a measurement that is
cut off leaves what it had; another one goes on with the parts that are missing.
"""

import contextlib
import gc
import multiprocessing
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
import torch

from benchmarks.measure import Figure, Ratio, machine
from stages.device import choose_device, versions
from stages.errors import PipelineError
from stages.files import replace_file
from stages.inputs.run_files import sha256

ROOT = Path(__file__).parents[1]
SMOKE, RATES = "smoke", "rates"
"""Kinds of runs; others are rehearsals."""
_SOURCES = ("benchmarks", "stages")
_SHORTEST, _STARTING = 1.0, 120.0
"""Seconds that must be left for a part to be begun; and that a machine has to say what it is."""
_SLOWER = 8
"""Limits are those of a GPU; times this without one."""
_TOLD = 160
"""Letters of an error in one line."""
_FORKS = multiprocessing.get_context("fork")
"""torch is imported already, and a GPU is never asked for in the process that forks."""

Measured = list[Ratio | Figure]
Found = tuple[str, Measured]
"""What a part has to say in a few words, and its figures."""


@dataclass(frozen=True)
class Where:
    """device: its name. folder: for what parts leave to one another. quick: a rehearsal."""

    device: str
    folder: Path
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Part:
    """limit: seconds, after which it is given up."""

    name: str
    limit: float
    run: Callable[[Where], Found]


class SkippedError(Exception):
    """What a part raises that cannot be done here; its message says why."""


class Result(msgspec.Struct, kw_only=True):
    """What became of a part. message: what it says, or why it failed or was skipped, in one line.
    trace: of an error.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    seconds: float
    message: str = ""
    trace: str = ""
    ratios: list[Ratio] = []
    figures: list[Figure] = []

    @property
    def line(self) -> str:
        return f"{self.state:<8}{self.seconds:6.1f} s  {self.name}  {self.message}".rstrip()


class Run(msgspec.Struct, kw_only=True):
    """All parts of one kind on one machine with one state of the code. code: a digest of the
    sources. commit: where there is a repository.
    """

    kind: str
    machine: dict[str, object]
    versions: dict[str, str]
    code: str
    commit: str = ""
    parts: list[Result] = []

    def same(self, other: "Run") -> bool:
        """Whether results of both belong together."""
        ours, theirs = (
            (r.kind, r.code, r.machine.get("device"), r.versions.get("torch"))
            for r in (self, other)
        )
        return ours == theirs


@dataclass
class Book:
    """A JSON file of runs, the latest last, to which results are added one by one."""

    path: Path
    run: Run

    def __post_init__(self) -> None:
        runs = read_runs(self.path) if self.path.exists() else []
        for known in runs:
            if known.same(self.run):
                self.run = known
        self._others = [run for run in runs if run is not self.run]

    @property
    def done(self) -> set[str]:
        """The names of parts that need not be repeated."""
        return {part.name for part in self.run.parts if part.state == "ok"}

    def add(self, result: Result) -> None:
        """Keep a result in place of an earlier one of the same part; of a part that has succeeded
        a failure does not replace the figures.
        """
        if result.state != "ok" and result.name in self.done:
            return
        others = [part for part in self.run.parts if part.name != result.name]
        self.run.parts = [*others, result]
        encoded = msgspec.json.format(msgspec.json.encode([*self._others, self.run]), indent=1)
        replace_file(self.path, encoded + b"\n")


def read_runs(path: Path) -> list[Run]:
    """Those of a book. Raises msgspec.ValidationError for another file."""
    return msgspec.json.decode(path.read_bytes(), type=list[Run])


def run_parts(
    parts: Sequence[Part], where: Where, keep: Callable[[Result], None], seconds: float
) -> list[Result]:
    """Run parts in their order, none longer than its limit and all no longer than `seconds`; those
    for which no time is left are skipped. keep: called with every result at once.
    """
    ends, results = time.monotonic() + seconds, list[Result]()
    with Worker(parts, where).running() as worker:
        for number, part in enumerate(parts):
            left = ends - time.monotonic()
            if left < _SHORTEST:
                result = Result(
                    name=part.name, state="skipped", seconds=0, message="no time is left"
                )
            else:
                limit = part.limit * (1 if where.on_gpu else _SLOWER)
                result = worker.run(number, min(left, limit))
            keep(result)
            results.append(result)
    return results


def this_run(kind: str, where: Where) -> Run:
    """A run without parts, of this machine and these sources. Raises RuntimeError where the device
    cannot be used: asked in a process of its own, as one that has used a GPU cannot be forked.
    """

    def ask(where: Where) -> Found:
        found = {"machine": machine(choose_device(where.device)), "versions": versions()}
        return msgspec.json.encode(found).decode(), []

    with Worker([Part("machine", _STARTING, ask)], where).running() as worker:
        result = worker.run(0, _STARTING)
    if result.state != "ok":
        raise RuntimeError(result.message)
    known = msgspec.json.decode(result.message)
    return Run(kind=kind, code=code_digest(), commit=_commit(), **known)


def code_digest(root: Path = ROOT) -> str:
    """12 hexadecimal digits: the same for the same sources, in a repository or out of it."""
    files = sorted(file for name in _SOURCES for file in (root / name).rglob("*.py"))
    lines = [f"{file.relative_to(root)} {sha256(file.read_bytes())}\n" for file in files]
    return sha256("".join(lines).encode())[:12]


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    with contextlib.suppress(OSError):
        found = subprocess.run(words, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""
    return ""


# ---- the process --------------------------------------------------------------------------------


class Worker:
    """The process in which parts run; replaced after one that did not succeed."""

    def __init__(self, parts: Sequence[Part], where: Where) -> None:
        self._parts, self._where = parts, where
        self._process: Any = None
        self._pipe: Connection | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator["Worker"]:
        """Ended at the end, also where this process is asked to end."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            yield self
        finally:
            self.stop()
            signal.signal(signal.SIGTERM, before)

    def run(self, number: int, limit: float) -> Result:
        """The result of a part; failed where it takes longer than `limit` seconds, or its process
        ends.
        """
        started, part = time.perf_counter(), self._parts[number]

        def failed(message: str) -> Result:
            self.stop()
            taken = time.perf_counter() - started
            return Result(name=part.name, state="failed", seconds=taken, message=message)

        try:
            pipe = self._started()
            pipe.send(number)
            if not pipe.poll(limit):
                return failed(f"given up after {limit:.0f} s")
            result = msgspec.json.decode(pipe.recv_bytes(), type=Result)
        except (EOFError, OSError):
            self._process.join(5)
            return failed(f"its process ended with exit code {self._process.exitcode}")
        if result.state == "failed":
            self.stop()
        result.seconds = time.perf_counter() - started
        return result

    def _started(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = _FORKS.Pipe()
            arguments = (theirs, self._pipe, self._parts, self._where)
            self._process = _FORKS.Process(target=_serve, args=arguments)
            self._process.start()
            theirs.close()
        return self._pipe

    def stop(self) -> None:
        """End the process, and what it has started."""
        if self._pipe is None:
            return
        self._pipe.close()
        self._pipe = None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self._process.join()


def _serve(pipe: Connection, parents: Connection, parts: Sequence[Part], where: Where) -> None:
    """Run the parts that are asked for until nobody asks any more."""
    gc.freeze()  # what was there before is not looked at after every part
    parents.close()  # or the end of the other process would not be seen
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(msgspec.json.encode(attempted(parts[pipe.recv()], where)))


def attempted(part: Part, where: Where) -> Result:
    """Run a part here, and catch what it raises."""
    started = time.perf_counter()

    def result(state: Literal["ok", "failed", "skipped"], message: str, trace: str = "") -> Result:
        taken = time.perf_counter() - started
        return Result(name=part.name, state=state, seconds=taken, message=message, trace=trace)

    try:
        message, found = part.run(where)
        done = result("ok", message)
        done.ratios = [one for one in found if isinstance(one, Ratio)]
        done.figures = [one for one in found if isinstance(one, Figure)]
    except SkippedError as reason:
        done = result("skipped", str(reason))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        named = (
            lines[0] if isinstance(error, PipelineError) else f"{type(error).__name__}: {lines[0]}"
        )
        done = result("failed", named[:_TOLD], traceback.format_exc())
    gc.collect()
    if where.on_gpu and done.state != "failed":
        torch.cuda.empty_cache()
    return done
