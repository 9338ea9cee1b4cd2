"""Figures that do not depend on how busy the machine is: ratios of two things run alternately.

Nothing here is a test: nothing fails by being slow. A ratio is the median over turns, each of which
runs both things, the one that goes first changing from turn to turn, so that drift cancels.
"""

import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import torch

from stages.device import device_name, versions

_CPU_NAME = Path("/proc/cpuinfo")
_SAMPLED_SECONDS = 0.005


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a thing and of its yardstick, turn by turn. target: of the median; the most that
    it should be, or the least where `at_least` says so. note: what explains it.
    """

    name: str
    ours: tuple[float, ...]
    yardstick: tuple[float, ...]
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.yardstick, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.median >= self.target if self.at_least else self.median <= self.target


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A number that has no yardstick of its own: bytes of memory, rows per second, a share."""

    name: str
    value: float
    unit: str
    target: float | None = None
    note: str = ""


class Report(msgspec.Struct, kw_only=True):
    """What was measured where. settings: of what. missing: what this machine cannot measure."""

    settings: dict[str, object]
    machine: dict[str, object]
    versions: dict[str, str]
    ratios: list[Ratio] = []
    figures: list[Figure] = []
    missing: list[str] = []

    def add(self, *measured: Ratio | Figure) -> None:
        for one in measured:
            if isinstance(one, Ratio):
                self.ratios.append(one)
            else:
                self.figures.append(one)

    def write(self, path: str | Path) -> None:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def new_report(settings: dict[str, object], device: torch.device) -> Report:
    """An empty report that names this machine."""
    return Report(settings=settings, machine=machine(device), versions=versions())


def machine(device: torch.device) -> dict[str, object]:
    """What a person would want to know of the machine beside its figures."""
    lines = _CPU_NAME.read_text().splitlines() if _CPU_NAME.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """How long some work takes; on a GPU until all that it started there is done."""
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def alternately(
    name: str,
    ours: Callable[[], float],
    yardstick: Callable[[], float],
    turns: int,
    target: float | None = None,
    note: str = "",
) -> Ratio:
    """Both things in every turn, each answering with its own seconds (see `seconds`)."""
    times = in_turns({"yardstick": yardstick, "ours": ours}, turns)
    return Ratio(
        name=name, ours=times["ours"], yardstick=times["yardstick"], target=target, note=note
    )


def in_turns(works: Mapping[str, Callable[[], float]], turns: int) -> dict[str, tuple[float, ...]]:
    """Any number of things in every turn, another one first each time: the seconds of each by its
    name, turn by turn.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            times[name].append(works[name]())
    return {name: tuple(found) for name, found in times.items()}


def steadily(
    work: Callable[[], object], device: torch.device | None = None, least: float = 0.05
) -> Callable[[], float]:
    """A short piece of work that answers with its seconds: done once to warm up, and from then on
    as often as takes `least` seconds together, so that the clock's grain does not show.
    """
    work()
    times = max(1, math.ceil(least / max(1e-9, seconds(work, device))))

    def repeated() -> float:
        return seconds(lambda: [work() for _ in range(times)], device) / times

    return repeated


class Laps:
    """How long something takes inside other work. A GPU is not waited for: a lap lasts from where
    its stream stands before to where it stands after.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - started)

    def take(self) -> list[float]:
        """Seconds of every lap since they were last taken."""
        _synchronise(self._device)
        taken = self._seconds + [first.elapsed_time(last) / 1e3 for first, last in self._events]
        self._seconds, self._events = [], []
        return taken


class Peak:
    """bytes: the most that this process has held beyond what it held before."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most resident memory that the process takes inside, sampled every few milliseconds."""
    process, peak, over = psutil.Process(), Peak(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    def watch() -> None:
        while not over.wait(_SAMPLED_SECONDS):
            sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
        sample()
    finally:
        over.set()
        watcher.join()


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
