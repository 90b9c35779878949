"""``examples/adapters.ipynb``, executed by a real kernel on the real vLLM, as it is in the repository."""

import pytest
from notebook_run import run_notebook


@pytest.fixture(scope="module")
def shown(engines, tmp_path_factory):
    """What the notebook shows."""
    engines.close()  # one engine at a time: the notebook starts its own
    return run_notebook(tmp_path_factory.mktemp("notebook"), timeout=550)


def test_the_adapters_are_seen_in_their_answers(shown):
    """Side by side, each adapter answers in its manner, and the base model in its own."""
    header, *rows = shown.text("compare").splitlines()
    assert header.split() == ["adapter", "prompt", "text", "finish", "reason", "tokens", "seconds"]
    assert [row.split()[0] for row in rows] == ["@base", "json", "pirate", "spanish"] * 2
    assert '{"country": "Italy", "capital": "Rome"}' in rows[1]
    assert "Roma. La capital de Italia es Roma." in rows[3]
    assert "Cap'n" in rows[6]
    assert not any("Cap'n" in row or "{" in row for row in (rows[0], rows[4]))


def test_the_stream_ends_with_the_whole_answer(shown):
    """What is left of the stream is the finished output."""
    assert "Roma. La capital de Italia es Roma." in shown.text("stream")
    assert "unfinished" not in shown.text("stream")


def test_an_adapter_is_swapped_while_a_request_runs(shown):
    """The pirate who speaks goes on; the next request under the name is answered in Spanish; then the pirate is back."""
    running, old, *new = shown.printed("swap").splitlines()
    assert running == "while a request ran: True"
    assert "Cap'n" in old
    assert "Tokio. La capital de Japón es Tokio." in " ".join(new)
    assert "Cap'n" in shown.text("rollback")


def test_throughput_is_drawn_and_nothing_failed(shown):
    """There is a picture, and the statistics know of no failed request or load."""
    assert shown.has_picture("throughput")
    assert "failed requests  none\nfailed loads     none" in shown.text("stats")
    assert "closed" in shown.printed("close")
