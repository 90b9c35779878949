"""The rules for how early the engine gets requests and adapters."""

from __future__ import annotations

import math

#: The engine is given some requests more than its batch holds, so that no place stays empty from the step that frees
#: it until we hear of it: one for so many places, and one for each request that is about to reach its ``max_tokens``,
#: as ``steps_ahead`` says. (Requests of one length, begun together, end together.)
PLACES_PER_SPARE = 8

#: Seconds that it takes to hand a request over: vLLM checks it, and sends it to its core.
HANDING_OVER = 0.0005

#: About to reach its ``max_tokens`` is who is within so many steps of it, and within more where steps are short. The
#: engine is given the next adapter when all requests of another are within so many, in any case.
STEPS_AHEAD = 4
MOST_STEPS_AHEAD = 16

#: Adapters that are read into host memory before their turn: as many as may change at once, which is one for each slot,
#: and so many at least.
LOOK_AHEAD = 2


def num_spare(max_num_seqs: int, num_ending: int) -> int:
    """Return how many requests beyond its batch the engine gets, if ``num_ending`` sequences are about to end.

    Example:
        >>> num_spare(64, num_ending=0), num_spare(64, num_ending=10)
        (8, 18)
    """
    return max(1, max_num_seqs // PLACES_PER_SPARE) + min(num_ending, max_num_seqs)


def steps_ahead(max_num_seqs: int, seconds: float) -> int:
    """Return how many steps early the next requests are handed over, if a step takes ``seconds``.

    As many as handing a whole batch over takes, so that the core does not begin it with a few. Not more, for who comes
    in between waits behind them.

    Example:
        >>> [steps_ahead(64, seconds) for seconds in (0.001, 0.003, 0.006, 0.060)]
        [16, 11, 6, 4]
    """
    return max(STEPS_AHEAD, min(MOST_STEPS_AHEAD, math.ceil(max_num_seqs * HANDING_OVER / max(seconds, 1e-6))))
