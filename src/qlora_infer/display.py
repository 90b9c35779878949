"""Tables of engines, adapters, outputs and statistics, for a notebook or a terminal.

Names, prompts, texts and what an adapter says of itself are anybody's. So every cell is escaped, for HTML and for
terminals, and cut. Tables have no colours of their own, and are legible on light and on dark pages.
"""

from __future__ import annotations

import html
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from attrs import frozen

#: What stands for the base model where adapters are named; no adapter's name may have an "@".
BASE_MODEL = "@base"

MAX_ROWS = 100
MAX_CHARS = 1000
MAX_CHARS_IN_COLUMN = 50

_START = "text-align:start;vertical-align:top;white-space:pre-wrap;max-width:40em"
# Where a long word may break, a browser reckons that it needs no room. Short cells are to have theirs.
_LONG = f"{_START};overflow-wrap:anywhere"
_SHORT_CHARS = 30
_END = "text-align:end;vertical-align:top"
# Notebooks set what stands between dollar signs as a formula; these classes, MathJax's own, keep a text as it is.
_NO_FORMULAS = "tex2jax_ignore mathjax_ignore"

Cell = str | int | float | None


@frozen
class Table:
    """Rows under a header; or, without a header, rows of a label and a value.

    Attributes:
        rows: The cells; ``None`` is shown as ``-``, and columns of numbers are aligned to the right.
        header: The titles of the columns.
        empty: The text for a table without rows.
    """

    rows: Sequence[Sequence[Cell]]
    header: Sequence[str] = ()
    empty: str = "none"

    def text(self) -> str:
        """Aligned text; characters that can move a terminal's cursor are escaped as in Python."""
        if not self.rows:
            return self.empty
        length = MAX_CHARS_IN_COLUMN if self.header else MAX_CHARS
        rows = [[_for_terminal(cut(_format_cell(cell), length)) for cell in row] for row in self._first_rows]
        lines = [list(self.header), *rows] if self.header else rows
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        return "\n".join([*(self._aligned(line, widths) for line in lines), *self._rest()])

    def html(self) -> str:
        """Return a table in HTML, without scripts, colours or anything to fetch."""
        if not self.rows:
            return f"<p>{html.escape(self.empty)}</p>"
        head = f"<thead>{self._html_row(self.header, 'th', 'th')}</thead>" if self.header else ""
        first = "td" if self.header else "th"
        body = "".join(self._html_row(row, first, "td") for row in self._first_rows)
        rest = "".join(f"<p>{line}</p>" for line in self._rest())
        return f'<table class="{_NO_FORMULAS}">{head}<tbody>{body}</tbody></table>{rest}'

    def _html_row(self, row: Sequence[Cell], first: str, others: str) -> str:
        tags = [first] + [others] * (len(row) - 1)
        cells = [cut(_format_cell(cell), MAX_CHARS) for cell in row]
        styles = [
            _END if number else _LONG if len(cell) > _SHORT_CHARS else _START
            for cell, number in zip(cells, self._numbers, strict=True)
        ]
        shown = (
            f'<{tag} dir="auto" style="{style}">{cell}</{tag}>'
            for tag, style, cell in zip(tags, styles, map(_for_html, cells), strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = zip(self._numbers, spaces, line, strict=True)
        return "  ".join(space + cell if number else cell + space for number, space, cell in cells).rstrip()

    @property
    def _numbers(self) -> Sequence[bool]:
        """True for the columns that hold numbers."""
        return [not any(isinstance(cell, str) for cell in column) for column in zip(*self._first_rows, strict=True)]

    @property
    def _first_rows(self) -> Sequence[Sequence[Cell]]:
        return self.rows[:MAX_ROWS]

    def _rest(self) -> list[str]:
        return [f"… and {len(self.rows) - MAX_ROWS} more"] if len(self.rows) > MAX_ROWS else []


class Displayed(ABC):
    """An object that ``print`` shows as aligned text, and a notebook as tables; ``repr`` stays one line, for logs."""

    __slots__ = ()

    @abstractmethod
    def _tables(self) -> Sequence[Table]:
        """Return the tables, one below the other."""

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self._tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self._tables())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Mapping[str, str]:
        # With _repr_html_ alone, IPython in a terminal would show the repr.
        return {"text/plain": str(self), "text/html": self._repr_html_()}


class DisplayedCollection(Displayed):
    """A ``list`` or a ``dict`` with tables, which IPython would otherwise show as its items' ``repr``."""

    __slots__ = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def cut(text: str, length: int) -> str:
    """Return the beginning of a text, with an ellipsis if something is left out."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def format_names(names: Iterable[str], *, most: int = 3) -> str:
    """Return the first of some names, each cut at 120 characters, with an ellipsis if there are more."""
    first = list(islice(names, most + 1))
    return ", ".join(name[:120] for name in first[:most]) + (", …" if len(first) > most else "")


def _format_cell(cell: Cell) -> str:
    return "-" if cell is None else str(cell)


def _for_terminal(text: str) -> str:
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _for_html(text: str) -> str:
    # What joins letters or emojis is no control character; a lone surrogate cannot be sent to a browser.
    shown = (
        char if unicodedata.category(char) not in ("Cc", "Cs") or char in "\n\t" else _escape(char) for char in text
    )
    return html.escape("".join(shown))


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _width(text: str) -> int:
    """Return the number of a terminal's columns that a text takes."""
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):  # accents and the like stand over the letter before them
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
