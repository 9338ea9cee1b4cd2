"""Arrows go one way: the three rooms know neither the stages nor one another."""

import re
from pathlib import Path

import pytest

STAGES = Path(__file__).parents[1] / "stages"


IMPORTED = re.compile(r"^\s*(?:from|import) ((?:stages|pipeline)\S*)", re.MULTILINE)


@pytest.mark.parametrize("room", ["cache", "inputs", "objectives"])
def test_a_room_imports_itself_and_errors(room: str) -> None:
    allowed = ("stages.errors", "stages.files", "stages.settings", f"stages.{room}")
    for file in (STAGES / room).rglob("*.py"):
        for imported in IMPORTED.findall(file.read_text()):
            assert imported.startswith(allowed), file
