"""Runs of the same requests in two engines, in turn: how fast, how soon and how evenly each answers."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import asdict, frozen
from many_adapters import orders

from qlora_infer.plan.graphs import VLLM_LARGEST_GRAPH

#: How many times as often a cell is run that has fewer requests than the most: its runs are short, and so uncertain.
OFTEN = 4
SORTED = dict.fromkeys(("Zipf", "Zipf, sorted by hand"), "Zipf, sorted by hand")
BY_HAND = "sorted by hand"


class Side(Protocol):
    """One of the two that are compared."""

    @property
    def stepped(self) -> Any:
        """The object whose ``step`` makes one step of the engine."""
        ...

    @property
    def num_swaps(self) -> int:
        """The number of times an adapter was moved into a slot since the engine started."""
        ...

    def run(self, texts: Sequence[Any], params: Sequence[Mapping[str, Any]], names: Sequence[str | None]) -> list[Any]:
        """Answer prompts, each with the adapter of its name."""
        ...

    def drop_adapters(self) -> None:
        """Take all adapters out of slots and host memory."""
        ...


@frozen
class Cell:
    """The parameters of a run.

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
    def title(self) -> str:
        """The order, and where the adapters are; of one adapter there is no order."""
        return "-" if self.num_adapters < 2 else self.order + (", from disk" if self.is_cold else "")

    @property
    def by_hand(self) -> Cell:
        """The same requests, sorted by adapter by hand, from host memory."""
        return Cell(self.num_adapters, self.num_requests, SORTED.get(self.order, BY_HAND))


@frozen
class Run:
    """The results of a run; times in milliseconds.

    Attributes:
        tokens_per_second: Generated tokens by the time that all took.
        swaps_per_second: Moves of an adapter into a slot by the same time.
        num_steps: Steps that all took; which tells a scheduler's work apart from a machine's noise.
        num_first_steps: Steps that gave a request its first token. They have prompts, and take longer than others.
        num_large_steps: Of these, those with prompts of ``VLLM_LARGEST_GRAPH`` tokens or more. With what decodes
            beside, that is more than vLLM has a CUDA graph for by itself.
        first_token_median: From the moment that all requests were added; so it has the time that they waited.
        first_token_p99: What 99 of 100 were faster than.
        gap_median: Of the times between the ends of steps, each of which gives every running request a token.
        gap_p99: Of the same.
    """

    tokens_per_second: float
    swaps_per_second: float
    num_steps: float
    num_first_steps: float
    num_large_steps: float
    first_token_median: float
    first_token_p99: float
    gap_median: float
    gap_p99: float


def plan(numbers_of_adapters: Sequence[int], numbers_of_requests: Sequence[int], slots: int) -> Iterator[Cell]:
    """Yield the cells of a table, for each number of adapters the most requests first.

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
    """Return the value that 99 of 100 do not exceed; NaN if there are none."""
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
        self._read_since_drop: set[str | None] | None = None  # None: nothing was dropped, so that all are there
        step, ends = side.stepped.step, self._ends

        def timed_step() -> Any:
            output = step()
            ends.append(time.monotonic())
            return output

        side.stepped.step = timed_step

    def run(self, cell: Cell, *, num_tokens: int | None = None) -> Run:
        """Run the cell's requests once.

        Unless the cell is cold, their adapters are in host memory.
        """
        if cell.is_cold:
            self._drop_adapters()
        elif self._read_since_drop is not None:
            left_on_disk = sorted({name for name in cell.names if name} - self._read_since_drop)
            if left_on_disk:
                self._run(left_on_disk, 1)
        return self._run(cell.names, num_tokens or self._num_tokens)

    def milliseconds(self, name: str | None) -> float:
        """Return how many milliseconds a request of one token takes."""
        began = time.monotonic()
        self._run([name], 1)
        return 1e3 * (time.monotonic() - began)

    def swaps(self, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds of a request of one token by where its adapter is; ``names`` are twice the slots, or more."""
        warm = [self.milliseconds(name) for name in itertools.chain(names, names)][len(names) :]
        in_slot = [self.milliseconds(names[-1]) for _ in names]
        self._drop_adapters()
        cold = [self.milliseconds(name) for name in names]
        found = {"in a slot": in_slot, "in host memory": warm, "on disk": cold}
        return {where: statistics.median(values) for where, values in found.items()}

    def _drop_adapters(self) -> None:
        self._side.drop_adapters()
        self._read_since_drop = set()

    def _run(self, names: Sequence[str | None], num_tokens: int) -> Run:
        texts = self._prompts(len(names), self._num_tokens)
        params = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": num_tokens}] * len(names)
        self._ends.clear()
        swaps_before = self._side.num_swaps
        began = time.monotonic()
        outputs = self._side.run(texts, params, names)
        seconds = time.monotonic() - began
        if self._read_since_drop is not None:
            self._read_since_drop.update(names)
        num_swaps = self._side.num_swaps - swaps_before
        prompts_of_steps = Counter(map(_first_token, outputs))
        waits = [1e3 * (_first_token(output) - began) for output in outputs]
        gaps = [1e3 * (later - earlier) for earlier, later in itertools.pairwise(list(self._ends))]
        return Run(
            tokens_per_second=sum(map(_num_tokens, outputs)) / seconds,
            swaps_per_second=num_swaps / seconds,
            num_steps=float(len(self._ends)),
            num_first_steps=float(len(prompts_of_steps)),
            num_large_steps=float(
                sum(number * self._num_tokens >= VLLM_LARGEST_GRAPH for number in prompts_of_steps.values())
            ),
            first_token_median=statistics.median(waits),
            first_token_p99=p99(waits),
            gap_median=statistics.median(gaps or [math.nan]),
            gap_p99=p99(gaps),
        )


@frozen
class Comparison:
    """Two sides, run in turn; every run is kept as a line of JSON, every cell printed as a row of a table.

    Cells of as many requests of as many adapters, which differ in their order alone, are run in turn as well, so that
    an order is compared with the one sorted by hand of the same minute.

    Attributes:
        left: What is compared with, by its name.
        right: What is measured, by its name.
        repeats: Pairs of runs of each cell with the most requests, and ``OFTEN`` times as many of others.
        deadline: The moment (``time.monotonic``) after which no cells are begun, and no pair but the first of each.
        settings: What each line of JSON says beside.
        path: The file of these lines; ``None`` for none.
    """

    left: tuple[str, Timed]
    right: tuple[str, Timed]
    repeats: int
    deadline: float
    settings: Mapping[str, Any]
    path: Path | None

    def measure(self, cells: Sequence[Cell]) -> None:
        """Print the table, row by row; what there is no time for is named."""
        print(_line(self._header), _line(["---"] * len(self._header)), sep="\n", flush=True)
        most, num_left = max(cell.num_requests for cell in cells), len(cells)
        for (_, num_requests), group in itertools.groupby(cells, lambda cell: (cell.num_adapters, cell.num_requests)):
            if time.monotonic() > self.deadline:
                print(f"left out for lack of time: {num_left} of {len(cells)} rows", flush=True)
                return
            found = self._in_turn(list(group), self.repeats * (1 if num_requests == most else OFTEN))
            for cell in found:
                print(_line(self._row(cell, found)), flush=True)
            num_left -= len(found)

    def _in_turn(self, cells: Sequence[Cell], repeats: int) -> dict[Cell, list[tuple[Run, Run]]]:
        """Pairs of runs of each cell; what came first in one turn comes last in the next."""
        found: dict[Cell, list[tuple[Run, Run]]] = {cell: [] for cell in cells}
        for number in range(repeats):
            if number and time.monotonic() > self.deadline:
                break
            direction = 1 - 2 * (number % 2)
            for cell in cells[::direction]:
                sides = [self.left, self.right][::direction]
                runs = {name: self._kept(name, cell, number, side.run(cell)) for name, side in sides}
                found[cell].append((runs[self.left[0]], runs[self.right[0]]))
        return found

    @property
    def _header(self) -> list[str]:
        left, right = self.left[0], self.right[0]
        return [
            *("adapters", "requests", "order", "pairs", f"{left}, tokens/s", right, f"{right} / {left}"),
            *(f"{right} / {left} by hand", f"{right} / {right} by hand", f"swaps/s: {left}", right),
            *(f"first token ms: {left}", right, "p99:", right, f"gap p99 ms: {left}", right),
        ]

    def _row(self, cell: Cell, found: Mapping[Cell, Sequence[tuple[Run, Run]]]) -> list[object]:
        pairs, by_hand = found[cell], found.get(cell.by_hand)
        left, right = (_median(runs) for runs in zip(*pairs, strict=True))
        shares: list[object] = ["-", "-"]
        if by_hand and cell.num_adapters > 1:
            shares = [
                _ratio((pair[1], other[side]) for pair, other in zip(pairs, by_hand, strict=True)) for side in (0, 1)
            ]
        return [
            *(cell.num_adapters or "base", cell.num_requests, cell.title),
            *(len(pairs), left.tokens_per_second, right.tokens_per_second),
            _ratio((ours, plain) for plain, ours in pairs),
            *shares,
            *(left.swaps_per_second, right.swaps_per_second),
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


def _ratio(pairs: Iterable[tuple[Run, Run]]) -> float:
    """Return how much faster the first of two runs is, in the median of pairs."""
    return statistics.median(run.tokens_per_second / other.tokens_per_second for run, other in pairs)


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
