"""The measured figures in the documentation are those of ``benchmarks/results``."""

import importlib.util
import json
import re

import pytest
from doc_blocks import FENCE, ROOT, pages, text_of

spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

#: Every measured figure in their words is one of ``tables.quotes``.
MEASURED_PAGES = [
    *("README.md", "docs/index.md", "docs/benchmarks.md", "docs/why.md", "docs/hardware.md"),
    *("docs/internals/gpu.md", "docs/internals/cpu.md"),
]
FIGURE = re.compile(r"\d[\d,.]* (?:ms\b|times\b|tokens/s|%)")


def sentences(page):
    """The text of a page without its blocks and the tables that are made, on one line."""
    return " ".join(FENCE.sub("", tables.MARKED.sub("", text_of(page))).split())


@pytest.mark.parametrize("page", [page for page in pages() if "<!-- table: " in text_of(page)])
def test_a_pages_tables_are_those_of_the_results(page):
    """``python benchmarks/tables.py`` changes nothing."""
    assert tables.fill(text_of(page)) == text_of(page)


def test_every_table_is_on_a_page():
    """No table is made for nobody."""
    shown = {match["name"] for page in pages() for match in tables.MARKED.finditer(text_of(page))}
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize(("page", "words"), list(tables.quotes()))
def test_a_quoted_figure_is_that_of_the_results(page, words):
    """A sentence with a measured figure has the one that the results give."""
    assert words in " ".join(text_of(page).split())


@pytest.mark.parametrize("page", MEASURED_PAGES)
def test_no_figure_is_without_a_result(page):
    """Each time, speed and ratio in the words of these pages is part of a quote."""
    quoted = [words for where, words in tables.quotes() if where == page]
    rest = sentences(page)
    for words in quoted:
        rest = rest.replace(words, "")
    assert FIGURE.findall(rest) == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")), ids=lambda path: path.name)
def test_results_are_lines_of_json(path):
    """Each line of each file of results is an object."""
    assert all(isinstance(json.loads(line), dict) for line in path.read_text(encoding="utf-8").splitlines())


def test_a_median_names_where_it_is_from():
    """A median without raw runs has its machine, day, commit and command, or "unknown"."""
    for line in tables.results("medians"):
        assert all(isinstance(line[name], str) and line[name] for name in ("machine", "date", "commit", "command")), (
            line
        )
