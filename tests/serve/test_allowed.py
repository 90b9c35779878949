"""The sources from which adapters may come."""

import pytest

from qlora_infer.serve.allowed import AllowedSources, SourceNotAllowedError
from qlora_infer.sources.folder import FolderSource
from qlora_infer.sources.hub import HubSource
from qlora_infer.testing import write_adapter


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter, and a link to one beside it."""
    write_adapter(tmp_path / "adapters" / "pirate")
    write_adapter(tmp_path / "outside")
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "adapters"


def test_nothing_is_allowed_by_default(tmp_path):
    """Neither a folder nor a repository, until the operator says so."""
    for text in (str(tmp_path), "me/pirate", "pirate"):
        with pytest.raises(SourceNotAllowedError):
            AllowedSources().parse(text)
        assert AllowedSources().find(text) is None


def test_a_folder_allows_what_is_in_it(folder):
    """By its name, a relative path or its own; not by one that leads elsewhere, links followed."""
    allowed = AllowedSources(folder)
    for text in ("pirate", "./pirate", str(folder / "pirate"), f"{folder}/../adapters/pirate"):
        assert allowed.parse(text) == FolderSource(folder / "pirate")
    for text in (
        "..",
        ".",
        "/",
        "link",
        "./link",
        "../outside",
        str(folder.parent / "outside"),
        "pirate/../../outside",
    ):
        with pytest.raises(SourceNotAllowedError):
            allowed.parse(text)


def test_prefixes_allow_repositories_and_urls():
    """One that ends in a slash allows what is below it, another itself only; no spelling of ``..`` gets around it."""
    allowed = AllowedSources(None, ("me/", "you/one@v1", "hf://x/"))
    assert allowed.parse("me/pirate@v2") == HubSource("me/pirate", revision="v2")
    assert allowed.parse("you/one@v1") == HubSource("you/one", revision="v1")
    for text in ("you/one", "you/one@v2", "menace/pirate", "me/x:..", "https://host/me/x"):
        with pytest.raises((SourceNotAllowedError, ValueError)):
            allowed.parse(text)


def test_adapters_are_found_by_their_names(folder):
    """A request that names a folder's adapter or an allowed repository finds its source, and nothing else does."""
    allowed = AllowedSources(folder, ("me/",))
    assert allowed.find("pirate") == FolderSource(folder / "pirate")
    assert allowed.find("me/pirate") == HubSource("me/pirate")
    for name in ("", ".", "..", "link", "parrot", "./pirate", str(folder / "pirate"), "you/pirate", "me/../x", "a\0b"):
        assert allowed.find(name) is None
