"""Tables of the page: a column is a heading, a meaning and a function of a row."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxquant_models.report.numbers import DASH, number

SENTENCE = 40  # characters of a second text from which on it is one
SHORT = 12  # rows of a long table that are shown before the reader asks for all


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      head: the heading, with the unit.
      meaning: a sentence for the legend; "" if the heading says it all.
      value: what the column is sorted by, a function of a row: number, text, or None.
      show: the text of a cell, a function of that value. Default: `number`.
      more: a second text below it, a function of a row. Default: none.
      code: whether the text is a command line, which is not broken.
      mark: "good", "bad" or "" of a row: the look of the cell, in addition to its words.
    """

    head: str
    meaning: str
    value: Callable[[Any], Any]
    show: Callable[[Any], str] = number
    more: Callable[[Any], str] | None = None
    mark: Callable[[Any], str] | None = None
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: its text, what it is sorted by, and how the template draws it."""

    text: str
    key: str
    numeric: bool
    more: str
    mark: str
    code: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, as the template draws it; the first column heads the rows.

    Attributes:
      caption: what the table shows.
      columns: the columns that have a value in some row.
      rows: the cells.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def first(self) -> "Table":
        """The first rows alone."""
        return dataclasses.replace(self, rows=self.rows[:SHORT])

    @property
    def wordy(self) -> bool:
        """Whether rows have sentences, which a phone has room for only across the whole width."""
        return any(len(row[0].more) > SENTENCE for row in self.rows)

    @property
    def long(self) -> bool:
        """Whether some rows are better hidden at first; two or three are not worth a click."""
        return len(self.rows) > SHORT + 3


def _cell(column: Column, row: object) -> Cell:
    value = column.value(row)
    numeric = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return Cell(
        text=DASH if value is None else column.show(value),
        key="" if value is None else repr(value) if numeric else str(value),
        numeric=numeric,
        more=column.more(row) if column.more else "",
        mark=column.mark(row) if column.mark else "",
        code=column.code,
    )


def table(caption: str, columns: Sequence[Column], rows: Sequence[object]) -> Table:
    """Return the table of the rows; columns that have no value in any row are dropped.

    Args:
      caption: what the table shows.
      columns: the columns; the first one is kept in any case.
      rows: the rows, at least one, as the columns' functions take them.
    """
    kept = tuple(
        c for c in columns if c is columns[0] or any(c.value(r) not in (None, "") for r in rows)
    )
    return Table(caption, kept, tuple(tuple(_cell(c, r) for c in kept) for r in rows))


SOURCE = (
    Column("figures of", "", lambda row: row[0], str),
    Column("source", "", lambda row: row[1], str),
)


def sources(caption: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return the table that states each source once, with the names that share it.

    Args:
      caption: what the table shows.
      pairs: names and their sources, at least one.
    """
    names: dict[str, list[str]] = {}
    for name, source in pairs:
        names.setdefault(source, []).append(name)
    return table(caption, SOURCE, [("; ".join(n), source) for source, n in names.items()])
