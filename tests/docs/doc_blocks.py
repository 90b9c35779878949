"""The fenced blocks of the documentation, and how its Python is run."""

import contextlib
import io
import re
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[2]

#: A page that begins with this needs the demo model: its Python runs in tests/engine/test_docs.py, on the real vLLM.
NEEDS_DEMO_MODEL = "<!-- demo model -->"

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)


@frozen
class Block:
    """One fenced block: where it is, its language, and what is in it."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


@frozen
class Ran:
    """A Python block that was run: what it printed, and what the page says it prints, ``None`` where it does not say."""

    block: Block
    printed: str
    shown: str | None


def pages():
    """Every page of the documentation, as a path from the repository's root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in found)


def text_of(page):
    """The page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def needs_demo_model(page):
    """Whether the page is run on the real vLLM."""
    return text_of(page).startswith(NEEDS_DEMO_MODEL)


def blocks(page):
    """The fenced blocks of a page, in their order."""
    text = text_of(page)
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"].strip(),
            re.sub(f"^{match['indent']}", "", match["code"], flags=re.M),
        )
        for match in FENCE.finditer(text)
    ]


def run_python(page, skip=()):
    """Run the Python of a page as one script, block after block; a ``text`` block is what the one before prints."""
    namespace, ran = {"__name__": "__main__"}, []
    for block, following in zip(found := blocks(page), [*found[1:], None]):
        if block.language != "python" or str(first_line(block)) in skip:
            continue
        printed = io.StringIO()
        # The empty lines give tracebacks the page's own line numbers.
        code = compile("\n" * block.line + block.code, str(ROOT / page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        shown = following.code if following is not None and following.language == "text" else None
        ran.append(Ran(block, printed.getvalue(), shown))
    return ran


def first_line(block):
    """What a block is named by where line numbers would not last."""
    return block.code.partition("\n")[0]
