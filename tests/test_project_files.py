"""The files beside the code that others rely on: the license and the changelog."""

import hashlib
import re

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
