"""What another machine needs to go on, as one tar file: the size, the teacher, students' results.

The cache is not in it, nor are half-trained students: these would need the very same cache.
"""

import tarfile
from pathlib import Path

from stages.inputs.run_files import read_summary

_KEPT = ("config.yaml", "summary.json", "metrics.jsonl", "log.txt")
"""Of a finished student; of the teacher its weights as well."""


def finished(run: Path) -> bool:
    """Whether there is a run, and it has ended."""
    return run.is_dir() and read_summary(run) is not None


def pack(work: Path, file: Path) -> None:
    """What another machine needs to go on: the size, the teacher, the results of students."""
    partial = file.with_name(f"{file.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for path in sorted(work.rglob("*")):
            name = path.relative_to(work)
            if path.is_file() and _travels(work, name):
                tar.add(path, str(name))
    partial.replace(file)


def _travels(work: Path, name: Path) -> bool:
    if name.parts[0] == "cache.zarr":
        return False
    if name.parts[0] == "teacher":
        return name.name != "last.pt" or not finished(work / "teacher")
    if len(name.parts) == 1 or name.parent == Path("students"):
        return name.suffix != ".partial"
    return name.name in _KEPT and finished(work / name.parent)


def unpack(file: Path, work: Path) -> None:
    """The other way, into a folder in which nothing was begun."""
    work.mkdir(parents=True, exist_ok=True)
    if file.exists() and not any(work.iterdir()):
        with tarfile.open(file) as tar:
            tar.extractall(work, filter="data")
