"""The table of refused adapters in docs/errors.md is the corpus'."""

from corpus import errors_table


def test_the_page_has_the_corpus_verdicts():
    """Each refused kind with its message and its way out, word for word: run ``python -m corpus.errors_table`` if not."""
    assert errors_table.in_page(errors_table.PAGE.read_text(encoding="utf-8")) == errors_table.table()
