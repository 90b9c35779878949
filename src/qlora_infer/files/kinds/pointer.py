"""The files that stand in the place of others: Git LFS pointers and web pages."""

from __future__ import annotations

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: a pointer's first line.
_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
#: As many bytes of a file are enough for ``in_place_of``.
NUM_FIRST_BYTES = 64


def in_place_of(content: bytes) -> str:
    """Return the kind of a placeholder, with the next step, from a file's first bytes; empty for none.

    Example:
        >>> in_place_of(b"version https://git-lfs.github.com/spec/v1")
        'it is a Git LFS pointer, not the file itself: run "git lfs pull" in its repository'
    """
    if content.startswith(_LFS):
        return 'it is a Git LFS pointer, not the file itself: run "git lfs pull" in its repository'
    if content.lstrip()[: len(_WEB_PAGE[0])].lower().startswith(_WEB_PAGE):
        return "it is a web page, not the file itself: download the file (the Hub has it at /resolve/, not at /blob/)"
    return ""
