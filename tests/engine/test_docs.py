"""The pages that need the demo model, run on the real vLLM."""

import pytest
from doc_blocks import needs_demo_model, pages, run_python


@pytest.mark.parametrize("page", [page for page in pages() if needs_demo_model(page)])
def test_a_demo_page_runs(page, engines, tmp_path, monkeypatch):
    """Every Python block of the page runs, and prints what the page shows: no answer in it hangs on a near tie."""
    engines.close()  # one engine at a time: the page starts its own
    monkeypatch.chdir(tmp_path)
    for ran in run_python(page):
        assert ran.shown in (None, ran.printed), ran.block
