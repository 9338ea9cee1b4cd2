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

from benchmarks.book import Result, Run, code_digest, commit
from benchmarks.measure import Figure, Ratio, machine
from stages.device import choose_device, versions
from stages.errors import PipelineError

_SHORTEST, _STARTING = 1.0, 120.0
"""Seconds that must be left for a part to be begun; and that a machine has to say what it is."""
_SLOWER = 8
"""Limits are those of a GPU; times this without one."""
_LONGEST_MESSAGE = 160
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
    return Run(kind=kind, code=code_digest(), commit=commit(), **known)


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
        kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
        message = f"{kind}{lines[0]}"[:_LONGEST_MESSAGE]
        done = result("failed", message, traceback.format_exc())
    gc.collect()
    if where.on_gpu and done.state != "failed":
        torch.cuda.empty_cache()
    return done
