"""What the templates show as tables and as large numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """A number that is shown large. role: the colour of a figure's role, or none."""

    what: str
    field: str
    value: float
    text: str
    role: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: what it is sorted by, where that is not its text. bar: length in
    [0, 1] of a bar beside it. mark: colour name and dashes of the curve that it belongs to.
    """

    text: str
    value: float | str | None = None
    field: str | None = None
    bar: float | None = None
    mark: tuple[str, Any] | None = None


class Row:
    """A row of a table. run, group: the names of what it is about."""

    def __init__(
        self, cells: Sequence[Cell | str], run: str | None = None, group: str | None = None
    ) -> None:
        self.cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        self.run, self.group = run, group


@dataclass(frozen=True)
class Table:
    """A table that can be sorted. The first `words` columns hold words, the others numbers; the
    first names the row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    words: int = 1
    note: str = ""
