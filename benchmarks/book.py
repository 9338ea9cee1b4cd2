"""A JSON file of what became of parts of measurements: by kind, machine, and state of the code."""

import contextlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.measure import Figure, Ratio
from stages.files import replace_file
from stages.inputs.run_files import sha256

ROOT = Path(__file__).parents[1]
SMOKE_RUN, RATES_RUN = "smoke", "rates"
"""Kinds of runs; others are rehearsals."""
_SOURCES = ("benchmarks", "stages")


class Result(msgspec.Struct, kw_only=True):
    """What became of a part. message: what it says, or why it failed or was skipped, in one line.
    trace: of an error.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    seconds: float
    message: str = msgspec.field(default="", name="told")
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


def code_digest(root: Path = ROOT) -> str:
    """12 hexadecimal digits: the same for the same sources, in a repository or out of it."""
    files = sorted(file for name in _SOURCES for file in (root / name).rglob("*.py"))
    lines = [f"{file.relative_to(root)} {sha256(file.read_bytes())}\n" for file in files]
    return sha256("".join(lines).encode())[:12]


def commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    with contextlib.suppress(OSError):
        found = subprocess.run(words, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""
    return ""
