"""The demo's settings, without running it."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from pipeline import demo


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
