"""Tables of a bench with a heading each, as markdown and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from .averages import geometric_mean

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 1000  # columns of text that goes to no terminal: more than any table has


@dataclass(frozen=True)
class Column:
    """A column: `read` gives a row's number, shown by `form`, or its text; None leaves the cell empty."""

    title: str
    read: Callable[[Any], float | str | None]
    form: str = "{:.2f}"

    def cell(self, row: Any) -> str:
        value = self.read(row)
        return "" if value is None else value if isinstance(value, str) else self.form.format(value)

    def mean(self, rows: Iterable[Any]) -> str:
        """The geometric mean of the numbers that are there."""
        numbers = [value for value in map(self.read, rows) if isinstance(value, (int, float)) and value > 0]
        found = geometric_mean(numbers)
        return "" if found is None else self.form.format(found)


@dataclass
class Section:
    """A heading, a sentence on how to read the table, the table, and notes behind it."""

    heading: str
    caption: str = ""
    titles: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = field(default_factory=list)
    level: int = 2


def tabulated(columns: Sequence[Column], rows: Sequence[Any], mean: str = "") -> tuple[list[str], list[list[str]]]:
    """(titles, cells) without columns that are empty in every row; `mean` names a last row of geometric means."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    if mean and len(rows) > 1:
        cells.append([mean, *(column.mean(rows) for column in columns[1:])])
    return without_empty([column.title for column in columns], cells)


def without_empty(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the columns that are not empty in every row."""
    kept = [i for i in range(len(titles)) if any(line[i] for line in cells)]
    return [titles[i] for i in kept], [[line[i] for i in kept] for line in cells]


def to_markdown(sections: Sequence[Section]) -> str:
    """The sections one after the other."""
    lines: list[str] = []
    for section in sections:
        lines += [f"{'#' * section.level} {section.heading}", ""]
        lines += [section.caption, ""] if section.caption else []
        if section.rows:
            lines.append(_line(section.titles))
            lines.append("|" + "---|" * len(section.titles))
            lines += [_line(row) for row in section.rows]
            lines.append("")
        lines += [*(f"- {note}" for note in section.notes), ""] if section.notes else []
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells)
    return "|" + "|".join(f" {cell} " if cell else " " for cell in escaped) + "|"


def print_text(sections: Sequence[Section], console: Console) -> None:
    """The same as text."""
    for section in sections:
        console.print(Text(section.heading, "bold" if section.level == 2 else "italic"))
        if section.caption:
            console.print(Text(section.caption, "dim"))
        if section.rows:
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
            for i, title in enumerate(section.titles):
                table.add_column(Text(title), justify="right" if i else "left", overflow="fold")
            for row in section.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for note in section.notes:
            console.print(Text(f"note: {note}", "yellow"))
        console.print()
