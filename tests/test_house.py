"""Arrows go one way: the three rooms know neither the stages nor one another."""

import re
from pathlib import Path

import pytest

STAGES = Path(__file__).parents[1] / "stages"


IMPORTED = re.compile(r"^\s*(?:from|import) ((?:stages|pipeline)\S*)", re.MULTILINE)


@pytest.mark.parametrize("room", ["cache", "inputs", "objectives"])
def test_a_room_imports_itself_and_errors(room: str) -> None:
    for file in (STAGES / room).rglob("*.py"):
        for imported in re.findall(
            r"^\s*(?:from|import) (stages\S*|pipeline\S*)", file.read_text(), re.M
        ):
            assert imported == "stages.errors" or imported.startswith(f"stages.{room}"), file
