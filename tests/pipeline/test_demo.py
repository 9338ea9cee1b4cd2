"""The demo's settings, and what it removes, without running it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import RUN_FILES

from pipeline import demo
from pipeline.console import Console
from stages.errors import RunError
from stages.training.run_folder import held


def structs_in(value: Any, where: str) -> Iterator[tuple[str, msgspec.Struct]]:
    """Every struct in a constant, and in the containers it is made of."""
    if isinstance(value, msgspec.Struct):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from structs_in(inner, f"{where}[{key}]")
    elif isinstance(value, (tuple, list)):
        for position, inner in enumerate(value):
            yield from structs_in(inner, f"{where}[{position}]")


FOUND = {
    where: struct
    for name, value in vars(demo).items()
    if name.isupper()
    for where, struct in structs_in(value, name)
}


def test_every_setting_could_have_been_read_from_a_file() -> None:
    """A struct's constructor checks no types: a misspelt word would only be found in the run."""
    assert {name.partition("[")[0] for name in FOUND} >= {"DATA", "TEACHER", "STUDENT", "STUDENTS"}
    assert sum(name.startswith("STUDENTS") for name in FOUND) == 2 * len(demo.STUDENTS)
    for where, struct in FOUND.items():
        assert msgspec.convert(msgspec.to_builtins(struct), type(struct)) == struct, where


@pytest.mark.parametrize(
    ("seeds", "hard", "kd"),
    [
        (1, "7 80.00% 1.5 s", "7 85.00% +5.00 1.5 s"),
        (2, "7 81.00% ± 1.41 1.5 s", "7 87.00% ± 2.83 +6.00 1.5 s"),
    ],
)
def test_the_table_says_what_was_measured(
    capsys: pytest.CaptureFixture[str], seeds: int, hard: str, kd: str
) -> None:
    """One seed has no deviation; the time is that of a warm epoch, not of a run."""
    top1 = {"hard labels": (0.80, 0.82), "KD": (0.85, 0.89), "KD, bias-aware": (0.9, 0.9)}
    students = {
        name: [{"parameters": 7, "last": {"test_top1": x}, "epoch_seconds": 1.5} for x in values]
        for name, values in ((name, values[:seeds]) for name, values in top1.items())
    }
    teacher = {"parameters": 70, "last": {"test_top1": 0.95}}
    demo._show(Console(), teacher, students, {"teacher training": 32.0})
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {f"hard labels {hard}", f"KD {kd}"} <= set(shown)


def write(file: Path, text: str = "text") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """What a demo leaves, in small."""
    out = tmp_path / "demo"
    for run in ("teacher", "students/KD-0"):
        for name in RUN_FILES:
            write(out / run / name)
    for name in ("zarr.json", "label/zarr.json", "label/c/0", "commits/logits/0"):
        write(out / "digits.zarr" / name)
    for name in ("students/results.jsonl", "results.json", "report.html"):
        write(out / name)
    return out


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def test_what_no_demo_has_made_stays(earlier: Path) -> None:
    for mine, named in {
        "notes.txt": "notes.txt",
        "teacher/notes.txt": "teacher",
        "students/KD-0/inner/config.yaml": "students/KD-0",
        "data/train/0/0.png": "data",
    }.items():
        write(earlier / mine)
        before = files_in(earlier)
        with pytest.raises(RunError, match="what no demo has made") as refused:
            demo.run_demo(str(earlier), Console(), overwrite=True)
        assert str(earlier / named) in str(refused.value)
        assert files_in(earlier) == before
        (earlier / mine).unlink()


def test_a_demo_needs_a_folder_of_its_own(earlier: Path) -> None:
    with pytest.raises(RunError, match="is not empty"):
        demo.run_demo(str(earlier), Console())
    with held(earlier), pytest.raises(RunError, match="another process is writing to"):
        demo.run_demo(str(earlier), Console(), overwrite=True)
    with pytest.raises(RunError, match=r"results\.json"):
        demo.run_demo(str(earlier / "results.json"), Console(), overwrite=True)
    assert "teacher/last.pt" in files_in(earlier)
    demo._make_room(earlier, overwrite=True)
    assert not files_in(earlier)
