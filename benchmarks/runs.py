"""Runs of the same requests in two engines, in turn: how fast, how soon and how evenly each answers."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import asdict, field, frozen
from many_adapters import orders

SORTED = dict.fromkeys(("Zipf", "Zipf, sorted by hand"), "Zipf, sorted by hand")
BY_HAND = "sorted by hand"


class Side(Protocol):
    """One of the two that are compared."""

    @property
    def stepped(self) -> Any:
        """The object whose ``step`` makes one step of the engine."""
        ...

    def run(self, texts: Sequence[Any], params: Sequence[Mapping[str, Any]], names: Sequence[str | None]) -> list[Any]:
        """Answer prompts, each with the adapter of its name."""
        ...

    def drop_adapters(self) -> None:
        """Take all adapters out of slots and host memory."""
        ...


@frozen
class Cell:
    """What is asked.

    Attributes:
        num_adapters: How many adapters take turns; 0 for the base model.
        num_requests: Requests that are added at once.
        order: The order of their adapters, one of ``many_adapters.orders``.
        is_cold: Whether the adapters are on disk only, when the requests come.
    """

    num_adapters: int
    num_requests: int
    order: str = "interleaved"
    is_cold: bool = False

    @property
    def names(self) -> list[str | None]:
        """The adapter of each request."""
        if not self.num_adapters:
            return [None] * self.num_requests
        return list(orders(self.num_adapters, self.num_requests)[self.order])

    @property
    def by_hand(self) -> Cell:
        """The same requests, sorted by adapter by hand, from host memory."""
        return Cell(self.num_adapters, self.num_requests, SORTED.get(self.order, BY_HAND))


@frozen
class Run:
    """What came of it; times in milliseconds.

    Attributes:
        tokens_per_second: Generated tokens by the time that all took.
        first_token_median: From the moment that all requests were added; so it has the time that they waited.
        first_token_p99: What 99 of 100 were faster than.
        gap_p99: Of the times between the ends of steps, each of which gives every running request a token.
    """

    tokens_per_second: float
    first_token_median: float
    first_token_p99: float
    gap_p99: float


def plan(numbers_of_adapters: Sequence[int], numbers_of_requests: Sequence[int], slots: int) -> Iterator[Cell]:
    """The cells of a table, for each number of adapters the most requests first.

    More adapters than slots come in every order, with the most requests; and from disk.
    """
    most = max(numbers_of_requests)
    for num_adapters in numbers_of_adapters:
        if num_adapters <= slots:
            yield Cell(num_adapters, most)
        else:
            yield from (Cell(num_adapters, most, order) for order in (BY_HAND, "interleaved", "shuffled"))
            yield Cell(num_adapters, most, "interleaved", is_cold=True)
            yield from (Cell(num_adapters, most, order) for order in ("Zipf, sorted by hand", "Zipf"))
        yield from (Cell(num_adapters, number) for number in sorted(numbers_of_requests, reverse=True)[1:])


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 are not above; not a number where there are none."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else math.nan


class Timed:
    """A side whose steps are timed.

    Args:
        side: The engine.
        num_tokens: Tokens of each prompt and of each answer.
    """

    def __init__(self, side: Side, num_tokens: int, prompts: Callable[[int, int], Sequence[Any]]) -> None:
        self._side = side
        self._num_tokens = num_tokens
        self._prompts = prompts
        self._ends: list[float] = []
        step, ends = side.stepped.step, self._ends

        def timed_step() -> Any:
            output = step()
            ends.append(time.monotonic())
            return output

        side.stepped.step = timed_step

    def run(self, cell: Cell, *, num_tokens: int | None = None) -> Run:
        """The cell's requests, once."""
        if cell.is_cold:
            self._side.drop_adapters()
        return self._run(cell.names, num_tokens or self._num_tokens)

    def milliseconds(self, name: str | None) -> float:
        """How long a request of one token takes."""
        began = time.monotonic()
        self._run([name], 1)
        return 1e3 * (time.monotonic() - began)

    def swaps(self, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds of a request of one token by where its adapter is; ``names`` are twice the slots, or more."""
        warm = [self.milliseconds(name) for name in itertools.chain(names, names)][len(names) :]
        in_slot = [self.milliseconds(names[-1]) for _ in names]
        self._side.drop_adapters()
        cold = [self.milliseconds(name) for name in names]
        found = {"in a slot": in_slot, "in host memory": warm, "on disk": cold}
        return {where: statistics.median(values) for where, values in found.items()}

    def _run(self, names: Sequence[str | None], num_tokens: int) -> Run:
        texts = self._prompts(len(names), self._num_tokens)
        params = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": num_tokens}] * len(names)
        self._ends.clear()
        began = time.monotonic()
        outputs = self._side.run(texts, params, names)
        seconds = time.monotonic() - began
        waits = [1e3 * (_first_token(output) - began) for output in outputs]
        gaps = [1e3 * (later - earlier) for earlier, later in itertools.pairwise(list(self._ends))]
        return Run(sum(map(_num_tokens, outputs)) / seconds, statistics.median(waits), p99(waits), p99(gaps))


@frozen
class Comparison:
    """Two sides, run in turn; every run is kept as a line of JSON, every cell printed as a row of a table.

    Attributes:
        left: What is compared with, by its name.
        right: What is measured, by its name.
        repeats: Pairs of runs of each cell; the order changes from pair to pair.
        deadline: The moment (``time.monotonic``) after which no cell is begun.
        settings: What each line of JSON says beside.
        path: The file of these lines; ``None`` for none.
    """

    left: tuple[str, Timed]
    right: tuple[str, Timed]
    repeats: int
    deadline: float
    settings: Mapping[str, Any]
    path: Path | None
    medians: dict[tuple[str, Cell], Run] = field(factory=dict, init=False)

    def measure(self, cells: Sequence[Cell]) -> None:
        """Print the table, row by row; what there is no time for is named."""
        left, right = self.left[0], self.right[0]
        header = [
            *("adapters", "requests", "order", f"{left}, tokens/s", right, f"{right} / {left}"),
            *(
                f"{right} / {left} by hand",
                f"first token ms: {left}",
                right,
                "p99:",
                right,
                f"gap p99 ms: {left}",
                right,
            ),
        ]
        print(_line(header), _line(["---"] * len(header)), sep="\n", flush=True)
        for number, cell in enumerate(cells):
            if time.monotonic() > self.deadline:
                print(f"left out for lack of time: {len(cells) - number} of {len(cells)} rows", flush=True)
                return
            print(_line(self._row(cell, self._pairs(cell))), flush=True)

    def _pairs(self, cell: Cell) -> list[tuple[Run, Run]]:
        pairs = []
        for number in range(self.repeats):
            sides = [self.left, self.right]
            runs = {
                name: self._kept(name, cell, number, side.run(cell)) for name, side in sides[:: 1 - 2 * (number % 2)]
            }
            pairs.append((runs[self.left[0]], runs[self.right[0]]))
        for name, runs_of_side in zip((self.left[0], self.right[0]), zip(*pairs, strict=True), strict=True):
            self.medians[name, cell] = _median(runs_of_side)
        return pairs

    def _row(self, cell: Cell, pairs: Sequence[tuple[Run, Run]]) -> list[object]:
        left, right = (self.medians[name, cell] for name in (self.left[0], self.right[0]))
        ratio = statistics.median(theirs.tokens_per_second / ours.tokens_per_second for ours, theirs in pairs)
        by_hand = self.medians.get((self.left[0], cell.by_hand))
        return [
            *(cell.num_adapters or "base", cell.num_requests),
            "-" if cell.num_adapters < 2 else cell.order + (", from disk" if cell.is_cold else ""),
            *(left.tokens_per_second, right.tokens_per_second, ratio),
            right.tokens_per_second / by_hand.tokens_per_second if by_hand and cell.num_adapters > 1 else "-",
            *(left.first_token_median, right.first_token_median, left.first_token_p99, right.first_token_p99),
            *(left.gap_p99, right.gap_p99),
        ]

    def _kept(self, name: str, cell: Cell, pair: int, run: Run) -> Run:
        keep(self.path, {**self.settings, "side": name, "pair": pair, **asdict(cell), **asdict(run)})
        return run


def keep(path: Path | None, line: Mapping[str, Any]) -> None:
    """Append a line of JSON, so that it is there when the next run never ends."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _median(runs: Sequence[Run]) -> Run:
    columns = zip(*(asdict(run).values() for run in runs), strict=True)
    return Run(*map(statistics.median, columns))


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(_text, cells)) + " |"


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.2f}" if abs(cell) < 10 else f"{cell:.0f}"
    return str(cell)


def _num_tokens(output: Any) -> int:
    return len((getattr(output, "completions", None) or output.outputs)[0].token_ids)


def _first_token(output: Any) -> float:
    """Both sides tell the moment on the core's clock, which is ``time.monotonic``."""
    times = getattr(output, "times", None)
    return float(times.first_token if times else output.metrics.first_token_ts)
