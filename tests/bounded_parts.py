"""A measurement of parts that do well, fail, hang, die, or wait for a file.

    python bounded_parts.py BOOK FOLDER SECONDS NAME...

Every part that is begun adds a line to FOLDER/begun: its name and its process.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.book import Book
from benchmarks.gpu import measure
from benchmarks.measure import Figure
from benchmarks.parts import Found, Part, SkippedError, Where, this_run


def well(where: Where) -> Found:
    return "all is well", [Figure(name="answer", value=42, unit="")]


def fails(where: Where) -> Found:
    raise ValueError("no such kernel\nand many more lines")


def hangs(where: Where) -> Found:
    time.sleep(600)
    return "", []


def dies(where: Where) -> Found:
    os._exit(7)


def cannot(where: Where) -> Found:
    raise SkippedError("needs CUDA")


def waits(where: Where) -> Found:
    while not (where.folder / "go").exists():
        time.sleep(0.01)
    return "", []


def noted(name: str, run: Callable[[Where], Found]) -> Part:
    def begun(where: Where) -> Found:
        with (where.folder / "begun").open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
        return run(where)

    return Part(name, 0.1 if name == "hangs" else 60, begun)


KINDS = {run.__name__: run for run in (well, fails, hangs, dies, cannot, waits)}

if __name__ == "__main__":
    path, folder, seconds, *names = sys.argv[1:]
    parts = [noted(name, KINDS[name.partition("-")[0]]) for name in names]
    where = Where("cpu", Path(folder))
    book = Book(Path(path), this_run("rates", where))
    sys.exit(measure(parts, where, book, float(seconds)))
