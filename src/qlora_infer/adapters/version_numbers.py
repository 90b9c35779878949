"""Number the versions of adapter names."""

from __future__ import annotations

#: So many names that are gone are remembered.
NUM_REMEMBERED = 10_000


class VersionNumbers:
    """Numbers the versions of each name, 1 for the first; no number is given twice under a name.

    That holds also for a name that ends and comes again, so that ``"name@1"`` of before never means what came after. Of
    names that are gone only the last are remembered, so that ever new names take no memory. A name that is not known
    goes on after the largest number that was forgotten, for it may have been that one.

    It is not locked.

    Args:
        num_remembered: How many names that are gone are remembered.
    """

    def __init__(self, num_remembered: int = NUM_REMEMBERED) -> None:
        self._num_remembered = num_remembered
        self._newest: dict[str, int] = {}
        self._gone: dict[str, int] = {}  # the one that was longest ago comes first
        self._largest_forgotten = 0

    @property
    def num_names(self) -> int:
        """Names of which something is kept."""
        return len(self._newest) + len(self._gone)

    def next(self, name: str) -> int:
        """Return the number of a name's next version."""
        before = self._newest.get(name) or self._gone.pop(name, self._largest_forgotten)
        self._newest[name] = before + 1
        return before + 1

    def end(self, name: str) -> None:
        """Count a name that is gone, with all of its versions."""
        self._gone[name] = self._newest.pop(name)
        if len(self._gone) > self._num_remembered:
            longest_gone = next(iter(self._gone))
            self._largest_forgotten = max(self._largest_forgotten, self._gone.pop(longest_gone))
