"""Measured times, counted in the buckets of a histogram."""

from __future__ import annotations

from bisect import bisect_left

from attrs import field, frozen

#: The upper bounds of the buckets, in seconds; a last bucket has no bound. Few, because each is a series an adapter.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@frozen
class Durations:
    """Several measured times, in seconds.

    Attributes:
        count: Their number.
        total: Their sum.
        max: The longest.
        buckets: The numbers of times between each two of ``BOUNDS``: up to 1 ms first, above 300 s last.
    """

    count: int = 0
    total: float = 0.0
    max: float = 0.0
    buckets: tuple[int, ...] = field(default=(0,) * (len(BOUNDS) + 1), repr=False)

    @property
    def mean(self) -> float | None:
        """The mean; ``None`` without any."""
        return self.total / self.count if self.count else None

    def plus(self, seconds: float) -> Durations:
        """Return these durations and one more.

        Args:
            seconds: The further duration.
        """
        i, buckets = bisect_left(BOUNDS, seconds), self.buckets
        buckets = (*buckets[:i], buckets[i] + 1, *buckets[i + 1 :])
        return Durations(self.count + 1, self.total + seconds, max(self.max, seconds), buckets)


#: None measured yet.
NONE = Durations()
