"""The demo's settings, without running it."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from pipeline import demo
from pipeline.console import Console


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


@pytest.mark.parametrize("struct", FOUND.values(), ids=list(FOUND))
def test_every_setting_could_have_been_read_from_a_file(struct: msgspec.Struct) -> None:
    """A struct's constructor checks no types: a misspelt word would only be found in the run."""
    assert msgspec.convert(msgspec.to_builtins(struct), type(struct)) == struct


def test_the_settings_were_found() -> None:
    assert {name.partition("[")[0] for name in FOUND} >= {"DATA", "TEACHER", "STUDENT", "STUDENTS"}
    assert sum(name.startswith("STUDENTS") for name in FOUND) == 2 * len(demo.STUDENTS)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str], seeds: int) -> None:
    """One seed has no deviation; the time is that of a warm epoch, not of a run."""
    top1 = {"hard labels": (0.80, 0.82), "KD": (0.85, 0.89), "KD, bias-aware": (0.9, 0.9)}
    students = {
        name: [
            {"parameters": 7, "last": {"test_top1": value}, "epoch_seconds": 1.5}
            for value in values[:seeds]
        ]
        for name, values in top1.items()
    }
    teacher = {"parameters": 70, "last": {"test_top1": 0.95}}
    demo._show(Console(), teacher, students, {"teacher training": 32.0})
    lines = capsys.readouterr().out.splitlines()
    (hard,) = [line for line in lines if line.startswith("hard labels")]
    (kd,) = [line for line in lines if line.startswith("KD  ")]
    assert f"n={seeds}" in lines[1]
    assert hard.split()[2:] == (
        ["7", "80.00%", "1.5", "s"] if seeds == 1 else ["7", "81.00%", "±", "1.41", "1.5", "s"]
    )
    assert kd.split()[1:] == (
        ["7", "85.00%", "+5.00", "1.5", "s"]
        if seeds == 1
        else ["7", "87.00%", "±", "2.83", "+6.00", "1.5", "s"]
    )
