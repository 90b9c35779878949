"""The table of refused adapters in docs/errors.md, made from the corpus.

    PYTHONPATH=tests python -m corpus.errors_table

writes it into the page; ``tests/docs/test_errors_table.py`` holds the page against it.
"""

from __future__ import annotations

import re
from pathlib import Path

from corpus.all_entries import REFUSED
from corpus.entry import Entry

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
_SECTION = re.compile(r"(?<=<!-- corpus -->\n).*?(?=<!-- end of corpus -->)", re.DOTALL)


def table() -> str:
    """Return the table as Markdown."""
    rows = [
        "| adapter | from | error and message | remedy |",
        "| --- | --- | --- | --- |",
        *map(_row, REFUSED),
    ]
    return "".join(f"{row}\n" for row in rows)


def in_page(text: str) -> str:
    """Return the table that a page has."""
    found = _SECTION.search(text)
    assert found is not None
    return found[0]


def _row(entry: Entry) -> str:
    assert entry.error is not None
    message = entry.says[0].replace("|", r"\|")
    return f"| {entry.kind} | {entry.origin} | [{entry.error.__name__}](#{entry.error.__name__.lower()}): `{message}` | {entry.way_out} |"


if __name__ == "__main__":
    PAGE.write_text(_SECTION.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
