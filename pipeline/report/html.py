"""HTML that is escaped by construction: text goes in as `str`, what is HTML already as `Html`."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.console import visible


class Html(str):
    """Text that is HTML already and is not escaped again."""


Content = str | float | None | Sequence["Content"]
"""What an element may hold; None is nothing."""
VOID = {"img", "meta"}


def tag(name: str, /, *content: Content, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: `_` becomes `-`, a trailing one is dropped (`class_`); those that are
    None or False are left out, True stands alone.
    """
    opened = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        opened += f" {key}" if value is True else f' {key}="{html.escape(_text(value))}"'
    if name in VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{fragment(*content)}</{name}>")


def fragment(*content: Content) -> Html:
    """Several pieces after one another."""
    return Html("".join(map(_piece, content)))


def _piece(content: Content) -> str:
    if content is None:
        return ""
    if isinstance(content, Html):
        return content
    if isinstance(content, (str, int, float)):
        return html.escape(_text(content))
    return fragment(*content)


def _text(value: str | float) -> str:
    """Numbers with every digit they have: a reader of the page gets them back exactly. Characters
    that a browser would obey are written out.
    """
    return visible(value) if isinstance(value, str) else repr(value)


def number(value: float, text: str, **attributes: str | float | None) -> Html:
    """A number as people read it, with all of its digits in `data-value`."""
    return tag("span", text, class_="number", data_value=value, **attributes)


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: what it is sorted by, where that is not its text. bar: length in
    [0, 1] of a bar behind it, in the colour of a role (`right`, `wrong`, `rectified`).
    """

    content: Content
    value: float | str | None = None
    field: str | None = None
    bar: float | None = None
    role: str = "wrong"

    def html(self, header: bool, numeric: bool) -> Html:
        name, scope = ("th", "row") if header else ("td", None)
        bar = None
        if self.bar is not None:
            style = f"width:{100 * min(1.0, max(0.0, self.bar)):.1f}%"
            bar = tag("i", class_=f"bar fill-{self.role}", style=style)
            bar = tag("span", bar, class_="track", aria_hidden="true")
        return tag(
            name,
            tag("span", self.content, class_="text") if bar else self.content,
            bar,
            scope=scope,
            class_="number" if numeric else None,
            data_value=self.value,
            data_field=self.field,
        )


@dataclass(frozen=True)
class Row:
    """A row of a table; run: the name of the run it is about."""

    cells: Sequence[Cell | Content]
    run: str | None = None
    group: str | None = None


def table(
    caption: Content, columns: Sequence[str], rows: Sequence[Row], text_columns: int = 1
) -> Html:
    """A table that is sorted by clicking on a column's name (page.js).

    The first `text_columns` columns hold words, the others numbers; the first names the row.
    """
    heads = [
        tag(
            "th",
            tag("button", column, type="button"),
            scope="col",
            class_="number" if at >= text_columns else None,
        )
        for at, column in enumerate(columns)
    ]
    body = []
    for row in rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells]
        body.append(
            tag(
                "tr",
                [cell.html(at == 0, at >= text_columns) for at, cell in enumerate(cells)],
                data_run=row.run,
                data_group=row.group,
            )
        )
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", heads)),
        tag("tbody", body),
        class_="sortable",
    )
    # The table scrolls inside its frame: a phone's page does not.
    return tag("div", whole, class_="frame", tabindex="0", role="group")
