"""The files beside the code that others rely on: the license and the changelog."""

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from doc_blocks import ROOT

import qlora_infer

#: Of https://www.apache.org/licenses/LICENSE-2.0.txt, which begins with an empty line.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_license_is_apache_2_in_full():
    """LICENSE is the Apache Software Foundation's text, word for word."""
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(b"\n" + text).hexdigest() == APACHE_2


def test_the_changelog_keeps_its_form():
    """Versions have a date and stand in order, the newest first; changes stand under the six kinds of Keep a Changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## (.*)$", text, re.M)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)
    numbers = [tuple(map(int, re.findall(r"\d+", version)[:3])) for version in versions]
    assert numbers == sorted(numbers, reverse=True)
    assert not versions or versions[0].startswith(f"[{qlora_infer.__version__}]")
    kinds = re.findall(r"^### (.*)$", text, re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_who_contributes_finds_how():
    """CONTRIBUTING.md has the license of contributions, how to set up, and the sessions that CI runs."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "Contributions are under [Apache-2.0](LICENSE)" in text
    in_ci, named = (
        {name for line in re.findall(r"^nox -s ([\w ]+)", script, re.M) for name in line.split()}
        for script in ((ROOT / ".ci" / "run").read_text(encoding="utf-8"), text)
    )
    assert {"lint", "types", "light", "docs", "package", "tests"} == in_ci <= named


@pytest.mark.parametrize(("required", "ends"), [("", "2 skipped"), ("1", "1 failed, 1 error")])
def test_a_missing_package_skips_tests_and_fails_them_in_ci(required, ends, tmp_path):
    """``nox -s tests`` sets a variable with which neither a test nor a file of tests is skipped for want of a package."""
    missing = 'import pytest\n{}pytest.importorskip("no_such_package")\n'
    (tmp_path / "test_file.py").write_text(missing.format(""))
    (tmp_path / "test_function.py").write_text(missing.format("def test_it():\n    "))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "--continue-on-collection-errors", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "QLORA_INFER_REQUIRE_PACKAGES": required},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ends in ran.stdout, ran.stdout


def test_the_version_stands_in_one_place():
    """pyproject.toml has no version of its own: the build reads __version__."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert (
        f'__version__ = "{qlora_infer.__version__}"' in (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    )


def test_type_checkers_may_read_the_package():
    """py.typed lies beside the code, as PEP 561 wants it."""
    assert Path(qlora_infer.__file__).with_name("py.typed").read_bytes() == b""
