"""How engines, adapters, outputs and statistics look: to the letter in a terminal, parsed in a notebook, safe in both."""

import copy
import json
import pickle
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_infer import (
    AdapterResidency,
    AdapterStats,
    Completion,
    Durations,
    EngineStats,
    GenerationOutput,
    LoadedAdapter,
    RequestTimes,
)
from qlora_infer.adapters.version import LoadedAdapters
from qlora_infer.display import BASE_MODEL, MAX_ROWS, Table
from qlora_infer.requests.request import GenerationOutputs
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e"
TIMES = RequestTimes(queued=10.0, admitted=10.0, first_token=10.25, finished=11.5)

PIRATE = LoadedAdapter(
    name="pirate",
    version=2,
    int_id=3,
    source="me/pirate-lora",
    digest="0123456789abcdef" * 4,
    rank=8,
    num_modules=60,
    num_model_modules=210,
    num_bytes=5 << 20,
    base_model="org/model",
    lineage="quantized",
    share=2.0,
    carries=("chat_template.jinja",),
)
JAPANESE = LoadedAdapter("日本語", 1, 12, "./ja", "f" * 64, 64, 210, 210, 123 << 20, None)


class Page(HTMLParser):
    """The elements of a piece of HTML, their attributes, and its text in rows of cells."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self.open = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text


def page(shown):
    """What a notebook gets."""
    parsed = Page(shown._repr_html_())
    assert parsed.open == []
    return parsed


def an_output(text="Ahoy!", prompt="hello", adapter="pirate", **fields):
    fields = {
        "request_id": "r-1",
        "prompt_token_ids": (1, 2),
        "completions": (Completion(0, text, (3, 4, 5), "stop"),),
        "adapter_id": 3 if adapter else 0,
        "adapter_version": 2 if adapter else None,
        "prompt_logprobs": None,
        "finished": True,
        "times": TIMES,
        **fields,
    }
    return GenerationOutput(prompt=prompt, adapter=adapter, **fields)


def lines(text):
    """A text as it is written in a test."""
    return "\n".join(line[8:] for line in text.strip("\n").splitlines()).rstrip()


# Adapters -----------------------------------------------------------------------------------------------------------


def test_adapters_are_an_aligned_table():
    """Names to the left, numbers to the right, also where letters are two columns wide; repr is one line, that of a dict."""
    adapters = LoadedAdapters({"pirate": PIRATE, "日本語": JAPANESE})
    assert str(adapters) == lines("""
        adapter  version  rank  modules       MiB  share  lineage    source
        pirate         2     8  60 of 210     5.0    2.0  quantized  me/pirate-lora
        日本語         1    64  210 of 210  123.0    1.0  unknown    ./ja
    """)
    assert repr(adapters) == f"{{'pirate': {PIRATE!r}, '日本語': {JAPANESE!r}}}"


def test_columns_stay_aligned_whatever_stands_in_them():
    """Wide letters and emojis take two columns, accents and circles around a letter none."""
    words = ["cafe\u0301", "日本", "\N{SQUID}ab", "1\u20dd23"]
    table = Table([(word, "|") for word in words], ["word", "end"])
    assert table.text().splitlines() == ["word  end", "cafe\u0301  |", "日本  |", "\N{SQUID}ab  |", "1\u20dd23   |"]


def test_adapters_are_a_table_in_a_notebook():
    """The same cells, in HTML."""
    assert page(LoadedAdapters({"pirate": PIRATE})).rows == [
        ["adapter", "version", "rank", "modules", "MiB", "share", "lineage", "source"],
        ["pirate", "2", "8", "60 of 210", "5.0", "2.0", "quantized", "me/pirate-lora"],
    ]


def test_no_adapters_are_told():
    """An empty table is words."""
    assert str(LoadedAdapters()) == "no adapters"
    assert LoadedAdapters({})._repr_html_() == "<p>no adapters</p>"


def test_adapters_are_a_mapping_that_nobody_changes(tmp_path):
    """engine.adapters has a dict's equality, iteration, copies and pickles; what was read stays as it was."""
    with fake_engine(adapters={"a": write_adapter(tmp_path / "a")}) as engine:
        before = engine.adapters
        engine.load_adapter("b", write_adapter(tmp_path / "b", seed=1))
        with pytest.raises(TypeError):
            del before["a"]
        assert list(before) == ["a"]
        assert list(engine.adapters) == ["a", "b"]
        assert before == {"a": engine.adapters["a"]} != engine.adapters
        assert copy.copy(before) == pickle.loads(pickle.dumps(before)) == before
        assert json.dumps(dict(before), default=lambda adapter: adapter.name) == '{"a": "a"}'
        assert f"{before}" == str(before)


def test_a_loaded_adapter_is_told_line_by_line():
    """What load_adapter returns: one line in repr, a label and a value per line in print and in a notebook."""
    assert str(PIRATE) == lines("""
        name        pirate
        version     2, 0123456789ab
        source      me/pirate-lora
        format      PEFT
        rank        8
        modules     60 of 210
        size        5.0 MiB
        trained on  org/model (quantized)
        share       2.0
        carries     chat_template.jinja
    """)
    assert "\n" not in repr(PIRATE)
    rows = dict(page(PIRATE).rows)
    assert [f"{label:<11} {value}".rstrip() for label, value in rows.items()] == str(PIRATE).splitlines()


# Outputs ------------------------------------------------------------------------------------------------------------


def test_the_repr_of_an_output_is_short():
    """One line, with the beginnings of prompt and text, and without token ids; for logs."""
    assert repr(an_output()) == (
        "GenerationOutput(request_id='r-1', adapter='pirate', prompt='hello', text='Ahoy!', num_tokens=3, "
        "finish_reason='stop')"
    )
    long = repr(an_output("line " * 1000, "p" * 5000, adapter=None))
    assert long == (
        f"GenerationOutput(request_id='r-1', adapter=None, prompt='{'p' * 59}…', text='{'line ' * 11}line…', "
        "num_tokens=3, finish_reason='stop')"
    )


def test_an_output_is_printed_line_by_line():
    """Adapter, prompt, text, why it ended, tokens and seconds."""
    assert str(an_output("Ahoy!\nMatey.")) == lines(r"""
        adapter        pirate@2
        prompt         hello
        text           Ahoy!\nMatey.
        finish reason  stop
        tokens         2 in the prompt, 3 generated
        seconds        0.25 to the first token, 1.50 in all
    """)


def test_an_output_in_a_notebook_keeps_its_lines():
    """In HTML a line break of the text is one."""
    assert ["text", "Ahoy!\nMatey."] in page(an_output("Ahoy!\nMatey.")).rows


def test_a_partial_output_and_several_completions_are_told():
    """What has not happened is '-' or 'unfinished'; of n answers each is shown; token ids stand for a prompt without text."""
    completions = (Completion(0, "one", (1,), None), Completion(1, "two", (2,), "length"))
    partial = an_output(
        prompt=None, adapter=None, completions=completions, finished=False, times=RequestTimes(queued=1.0)
    )
    assert str(partial) == lines("""
        adapter        @base
        prompt         2 token ids
        text 1         one
        text 2         two
        finish reason  unfinished, length
        tokens         2 in the prompt, 2 generated
        seconds        - to the first token, - in all
    """)


def test_what_generate_returns_is_a_list_that_shows_as_a_table():
    """A list in everything but its looks; base and adapters one below the other."""
    with fake_engine() as engine:
        outputs = engine.generate(["one", "two"], use_tqdm=False)
        chats = engine.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert isinstance(outputs, list)
    assert outputs == [outputs[0], outputs[1]]
    assert repr(outputs) == f"[{outputs[0]!r}, {outputs[1]!r}]"
    assert [row[:3] for row in page(outputs).rows[1:]] == [
        ["@base", "one", "You said: one"],
        ["@base", "two", "You said: two"],
    ]
    assert page(chats).rows[1][2] == "You said: user: hi"


def test_a_list_of_outputs_is_an_aligned_table():
    """Long prompts and texts are cut; each of several completions has its row."""
    two = (Completion(0, "one", (1,), "stop"), Completion(1, "two", (2, 3), "length"))
    outputs = GenerationOutputs([an_output("x" * 80), an_output(adapter=None, completions=two)])
    assert str(outputs) == lines(f"""
        adapter  prompt  text                                                finish reason  tokens  seconds
        pirate   hello   {"x" * 49}…  stop                3      1.5
        @base    hello   one                                                 stop                1      1.5
        @base    hello   two                                                 length              2      1.5
    """)
    assert page(outputs).rows[1][2] == "x" * 80
    assert str(GenerationOutputs()) == "no outputs"


def test_a_table_of_many_rows_is_cut():
    """A hundred rows are shown, and how many more there are."""
    table = Table([(number,) for number in range(MAX_ROWS + 5)], ["number"])
    assert table.text().splitlines()[-2:] == ["    99", "… and 5 more"]
    assert table.html().endswith("</table><p>… and 5 more</p>")
    assert len(Page(table.html()).rows) == 1 + MAX_ROWS


# Statistics and engine ----------------------------------------------------------------------------------------------


def some_stats(names=("pirate",)):
    base = AdapterStats(num_finished=2, prompt_tokens=7, generation_tokens=40, queue_time=Durations(2, 0.003, 0.002))
    busy = AdapterStats(
        *(3, 1, 10, 2, 35, 200, 4), Durations(11, 0.11, 0.05), Durations(10, 1.0, 0.3), 0, {"RequestTimeoutError": 2}
    )
    return EngineStats(
        num_waiting=3,
        num_running=1,
        num_adapters_waiting=1,
        num_steps=120,
        num_restarts=1,
        step_time=Durations(120, 1.5, 0.05),
        kv_cache_usage=0.125,
        adapters={**dict.fromkeys(names, busy), None: base},
        residency={"cold": AdapterResidency(num_loads=1, num_evictions=1), "pirate": AdapterResidency(1, 1, 2, 1)},
        load_errors={"CorruptAdapterError": 1},
    )


def test_stats_are_printed_as_tables():
    """Totals, then a row for the base model and for each adapter, those that only were loaded too."""
    assert str(some_stats()) == lines("""
        engine           running
        requests         3 waiting, 1 running
        adapters         1 waiting for a slot
        steps            120, 12.5 ms in the mean
        tokens           42 in prompts, 240 generated
        KV cache         12% in use
        restarts         1
        failed requests  RequestTimeoutError 2
        failed loads     CorruptAdapterError 1

        adapter  waiting  running  finished  failed  tokens in  tokens out  queue ms  first token ms  swaps  loads  evictions  in memory
        @base          0        0         2       0          7          40       1.5               -      -      -          -          -
        cold           0        0         0       0          0           0         -               -      0      1          1          0
        pirate         3        1        10       2         35         200      10.0           100.0      4      2          1          1
    """)
    assert "\n" not in repr(some_stats())


def test_stats_are_two_tables_in_a_notebook():
    """The same, in HTML."""
    shown = page(some_stats())
    assert shown.tags.count("table") == 2
    assert ["tokens", "42 in prompts, 240 generated"] in shown.rows
    assert "pirate 3 1 10 2 35 200 10.0 100.0 4 2 1 1" in [" ".join(row) for row in shown.rows]


def test_an_engine_is_told_with_its_adapters(tmp_path):
    """One line in repr; in print the model, the state and the adapters; after close, too; in a notebook the same."""
    source = write_adapter(tmp_path / "a")
    with fake_engine() as engine:
        assert str(engine) == lines("""
        model         fake/model
        quantization  awq
        state         running
        requests      0 waiting, 0 running
        adapters      0, 8 in a batch at most
        """)
        engine.load_adapter("pirate", source)
        assert repr(engine) == "<QuantizedLoRAEngine fake/model running, adapters: pirate>"
        assert str(engine).endswith(f"\n\n{engine.adapters}")
        assert ["state", "running"] in page(engine).rows
        assert page(engine).rows[-1][0] == "pirate"
    assert repr(engine) == "<QuantizedLoRAEngine fake/model closed, adapters: pirate>"
    assert ["state", "closed"] in page(engine).rows


def test_a_dead_engine_says_so():
    """An engine whose core died is neither running nor closed."""
    backend = FakeEngine()
    with fake_engine(backend=backend) as engine:
        backend.die()
        with pytest.raises(RuntimeError):
            engine.generate("hello", use_tqdm=False)
        assert repr(engine) == "<QuantizedLoRAEngine fake/model dead, adapters: none>"


# Notebooks and terminals --------------------------------------------------------------------------------------------

SHOWN = {
    "adapters": LoadedAdapters({HOSTILE: JAPANESE, "x": PIRATE}),
    "adapter": LoadedAdapter(HOSTILE, 1, 1, HOSTILE, HOSTILE, 8, 1, 1, 1, HOSTILE, "other", 1.0, (HOSTILE,)),
    "output": an_output(HOSTILE, HOSTILE, HOSTILE),
    "outputs": GenerationOutputs([an_output(HOSTILE, HOSTILE, HOSTILE)]),
    "stats": some_stats([HOSTILE]),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_hostile_names_and_texts_are_escaped(kind):
    """What stands in names, prompts and texts is shown as text: no element of it, no attribute, no terminal's escape."""
    shown = SHOWN[kind]
    parsed = page(shown)
    assert set(parsed.tags) <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert {name for name, _ in parsed.attributes} == {"class", "dir", "style"}
    cells = [cell for row in parsed.rows for cell in row]
    assert any("<script>alert(1)</script>\"'&\\x1b[2J" in cell for cell in cells)
    printed = str(shown)
    assert "<script>alert(1)</script>\"'&\\x1b[2J\\u202e" in printed
    assert all(char.isprintable() or char == "\n" for char in printed + repr(shown))


@given(st.text(st.characters(codec=None)))
def test_any_text_fits_in_a_cell(text):
    """Any text, lone surrogates too, gives one line of printable characters, and HTML that can be sent and read back."""
    table = Table([(text, "end")], ["text", "more"])
    assert len(table.text().split("\n")) == 2
    ((_, _), (cell, end)) = Page(table.html().encode().decode()).rows
    assert end == "end"
    if text.isprintable() and len(text) <= 1000:
        assert cell == text


@pytest.mark.parametrize("kind", SHOWN)
def test_tables_are_legible_on_light_and_dark_pages(kind):
    """They set no colour, so that the notebook's own theme has its way."""
    styles = [value for name, value in page(SHOWN[kind]).attributes if name == "style"]
    assert styles
    assert not any("color" in style or "background" in style for style in styles)


def test_a_long_word_breaks_no_short_one():
    """A browser may break a word of a long cell anywhere, and would then make room for it by breaking names and headings."""
    shown = Page(Table([("pirate", "x" * 300)], ["adapter", "text"]).html())
    styles = [value for name, value in shown.attributes if name == "style"]
    assert ["anywhere" in style for style in styles] == [False, False, False, True]


@pytest.mark.parametrize("kind", SHOWN)
def test_dollars_are_no_formulas(kind):
    """Jupyter sets what stands between dollar signs as a formula, links and all, but not in these tables."""
    classes = [value for name, value in page(SHOWN[kind]).attributes if name == "class"]
    assert classes == ["tex2jax_ignore mathjax_ignore"] * len(SHOWN[kind]._tables())


def test_ipython_shows_tables_in_notebooks_and_terminals():
    """IPython takes the HTML for a notebook, and the aligned text, not the repr, for a terminal."""
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    for shown in SHOWN.values():
        bundle, _ = formatter.format(shown)
        assert bundle == {"text/plain": str(shown), "text/html": shown._repr_html_()}
    # Within another list, an output stays one line.
    assert formatter.format([SHOWN["output"]])[0] == {"text/plain": f"[{SHOWN['output']!r}]"}


def test_no_adapter_can_be_mistaken_for_the_base_model(tmp_path):
    """The word for the base model is none that an adapter may have."""
    with fake_engine() as engine, pytest.raises(ValueError, match="must not have an '@'"):
        engine.load_adapter(BASE_MODEL, write_adapter(tmp_path / "a"))
