"""The documentation's site: built without a warning, and complete without any other host."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from doc_blocks import ROOT

import qlora_infer
from qlora_infer import testing

#: What a browser fetches by itself; a link (``<a href>``) is followed by the reader only.
FETCHED = {
    *(("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("iframe", "src"), ("object", "data")),
    *(("link", "href"), ("image", "href"), ("use", "href"), ("video", "src"), ("audio", "src"), ("embed", "src")),
}


def text_of_page(path):
    """The text of a page, without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")))


class Fetches(HTMLParser):
    """Collects what a page makes a browser fetch, and the text of its styles and scripts."""

    def __init__(self):
        super().__init__()
        self.urls = []
        self.classes = set()
        self.inline = ""
        self._inside = None

    def handle_starttag(self, tag, attrs):
        self.urls += [value for name, value in attrs if (tag, name) in FETCHED and value]
        self.classes.update((dict(attrs).get("class") or "").split())
        self.inline += dict(attrs).get("style") or ""
        self._inside = tag

    def handle_data(self, data):
        self.inline += data if self._inside == "style" else ""


def foreign(text):
    """The addresses in a stylesheet that lead to another host."""
    return re.findall(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)", text)


def fetches(page):
    """What a page fetches."""
    parser = Fetches()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, as ``nox -s docs`` builds it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it hides the warnings from --strict, too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_fetches_from_another_host(site):
    """No script, style, font or image of the built site is on another host."""
    found = list(site.rglob("*.html"))
    assert len(found) > 10
    for path in found:
        page = fetches(path.read_text(encoding="utf-8"))
        assert [url for url in page.urls if re.match(r"(?:https?:)?//", url)] == [], path
        assert foreign(page.inline) == [], path
        # For diagrams of this kind the theme's script would fetch another from a foreign host.
        assert "mermaid" not in page.classes, path


def test_no_style_or_picture_fetches_from_another_host(site):
    """No stylesheet and no SVG imports anything from elsewhere."""
    found = [*site.rglob("*.css"), *site.rglob("*.svg")]
    assert {path.suffix for path in found} == {".css", ".svg"}
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert foreign(text) == [], path
        assert re.findall(r"href=\"(?:https?:)?//", text) == [], path


def test_a_foreign_host_is_noticed():
    """The check itself."""
    page = '<link rel="stylesheet" href="https://a.example/x.css"><a href="https://b.example">b</a><script src="//c.example/x.js">'
    assert fetches(page).urls == ["https://a.example/x.css", "//c.example/x.js"]
    assert foreign('@font-face { src: url("https://d.example/f.woff2") } p { color: url(#a) }') == [
        "https://d.example/f.woff2"
    ]


def test_examples_open_from_the_site(site):
    """Every file of examples/ is on the site; a script, which browsers download, has a page that shows it."""
    files = [path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.*") if path.suffix not in (".pyc", ".md")]
    assert [file for file in files if not (site / file).is_file()] == []
    page = (site / "examples" / "index.html").read_text(encoding="utf-8")
    for script in (file for file in files if file.suffix == ".py"):
        assert f'href="{script.relative_to("examples").with_suffix("")}/"' in page
        shown = text_of_page(site / script.with_suffix("") / "index.html")
        assert (ROOT / script).read_text(encoding="utf-8").strip() in shown


def test_the_notebook_is_shown_with_its_outputs(site):
    """Its page, which the first one links to, has tables, a plot, and every cell of the notebook as it is now."""
    path = site / "examples" / "adapters" / "index.html"
    assert 'href="examples/adapters/"' in (site / "index.html").read_text(encoding="utf-8")
    page = path.read_text(encoding="utf-8")
    assert "Roma. La capital de Italia es Roma." in page
    assert re.search(r'<img [^>]*src="\.\./adapters_files/[^"]+\.png"', page)
    shown = text_of_page(path)
    cells = json.loads((ROOT / "examples" / "adapters.ipynb").read_text(encoding="utf-8"))["cells"]
    stale = [cell["id"] for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]) not in shown]
    assert stale == [], "nox -s notebook writes the page anew"


def test_a_link_to_a_file_of_the_repository_is_its_name(site):
    """The site has no tests to link to."""
    page = (site / "why" / "index.html").read_text(encoding="utf-8")
    assert "<code>tests/engine/test_adapters.py</code>" in page
    assert "../tests/" not in page


@pytest.mark.parametrize("module", [qlora_infer, testing], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(site, module):
    """Each name of ``__all__`` is on the API reference, with an anchor to link to."""
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(qlora_infer\.[\w.]+)"', page)}
    assert set(module.__all__) - anchors == {"__version__"} & set(module.__all__)


def test_the_readme_is_told_of_every_page():
    """Each page for users is in the README, for readers on GitHub, except the site's own first page and the reference."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert {page for page in found if f"({page})" not in readme} == {"docs/index.md", "docs/api.md"}
