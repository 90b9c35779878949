"""``examples/adapters.ipynb``, executed by a real kernel on the real vLLM; and other ways to ask, in cells of our own."""

import json

import pytest
from notebook_run import run_notebook

MORE = {
    "more-generate": "print(engine.generate([prompt] * 2, greedy, adapter=[None, 'pirate'])[1].text)",
    "more-await": "print((await engine.add_request(prompt, greedy, adapter='spanish')).text)",
    "more-gather": """
import asyncio
outputs = await asyncio.gather(*(engine.add_request(prompt, greedy, adapter=name) for name in demo_adapters()))
print([output.adapter for output in outputs])
""",
    "more-streams": """
async for part in engine.stream(prompt, greedy, adapter="pirate"):
    pass
print(part.finished, part.text)
for part in engine.stream(prompt, greedy, adapter="pirate"):
    pass
print(part.finished, part.text)
""",
}


@pytest.fixture(scope="module")
def shown(engines, tmp_path_factory):
    """What the notebook shows."""
    engines.close()  # one engine at a time: the notebook starts its own
    return run_notebook(tmp_path_factory.mktemp("notebook"), at_the_end=MORE, timeout=550)


def test_the_adapters_are_seen_in_their_answers(shown):
    """Side by side, each adapter answers in its manner, and the base model in its own."""
    header, *rows = shown.text("compare").splitlines()
    assert header.split() == ["adapter", "prompt", "text", "finish", "reason", "tokens", "seconds"]
    assert [row.split()[0] for row in rows] == ["@base", "json", "pirate", "spanish"] * 2
    assert '{"country": "Italy", "capital": "Rome"}' in rows[1]
    assert "Roma. La capital de Italia es Roma." in rows[3]
    assert "Cap'n" in rows[6]
    assert not any("Cap'n" in row or "{" in row for row in (rows[0], rows[4]))


def test_answers_have_the_structure_that_was_asked_for(shown):
    """A schema and a choice in one batch, for the base model and for an adapter."""
    _, base, pirate = shown.text("json").splitlines()
    assert '"capital"' in base
    assert "Rome" in pirate or "Madrid" in pirate


def test_a_call_of_a_tool_is_data(shown):
    """The parser finds the name and the arguments of the call that the answer holds."""
    *_, begin, written, end, call = shown.printed("tools").strip().splitlines()  # after what vLLM logs of the template
    assert (begin, end) == ("<tool_call>", "</tool_call>")
    arguments = json.loads(written)["arguments"]
    assert call == f"weather {arguments}"
    assert arguments["city"] in ("Rome", "Madrid", "Tokyo")


def test_an_image_is_refused_in_words(shown):
    """The demo's model has no eyes, and the error says so."""
    assert "reads text only: it cannot be given an image" in shown.printed("image")


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


def test_every_way_to_ask_works_in_a_notebook(shown):
    """generate, top-level await, gather, for and async for, in cells, while the kernel's own event loop runs."""
    assert "hearties" in shown.printed("more-generate")
    assert "Tokio" in shown.printed("more-await")
    assert "['json', 'pirate', 'spanish']" in shown.printed("more-gather")
    first, second = shown.printed("more-streams").splitlines()
    assert first == second
    assert "hearties" in first


def test_a_notebook_shows_progress(shown):
    """The bar is there in a notebook, whose output is no terminal."""
    assert "2/2" in shown.on_stderr("more-generate") + shown.printed("more-generate")
