"""The traffic of soak.py: requests from threads and coroutines, and adapters that change beneath them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen
from soak_adapters import LONGEST, PROMPTS, SHORTEST, Content, Texts, Versions, greedy

from qlora_infer import (
    AdapterConflictError,
    AdapterError,
    AdapterLoadError,
    AdapterNotLoadedError,
    EngineStats,
    GenerationOutput,
    QLoRAInferError,
    QuantizedLoRAEngine,
    RequestCancelledError,
    RequestHandle,
    RequestRejectedError,
    RequestTimeoutError,
    TensorSource,
)

#: Seconds after which a request or a call is counted as lost.
LOST = 300.0

#: What becomes of a request, and how often.
Manner = Literal["read", "stream", "drop", "cancel", "time out", "too long", "exact"]
MANNERS: Mapping[Manner, int] = {
    "read": 8,
    "stream": 4,
    "drop": 3,
    "cancel": 3,
    "time out": 3,
    "too long": 1,
    "exact": 2,
}


@frozen
class Question:
    """A request to be made."""

    adapter: str | None
    prompt: str
    max_tokens: int
    manner: Manner
    timeout: float | None = None
    num_parts: int = 0
    pause: float = 0.0


class Ledger:
    """The ledger of requests and how they ended; any thread may write to it.

    Attributes:
        num_submitted: Requests that the engine has taken, for names that are never unloaded.
        ends: How they ended, by the class of the error, ``"output"`` for those without one.
        num_dropped: Streams that were left, whose ends only the engine counts.
        calls: Changes of adapters, by kind.
        num_tokens: Tokens that were compared with those of the version alone.
        faults: What must not happen; the first hundred of them in words.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_submitted = 0
        self.num_dropped = 0
        self.num_tokens = 0
        self.num_faults = 0
        self.ends: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.faults: list[str] = []

    def submitted(self, number: int = 1) -> None:
        """Count requests that were taken."""
        with self._lock:
            self.num_submitted += number

    def ended(self, outcome: GenerationOutput | BaseException) -> None:
        """Count the end of a request."""
        kind = type(outcome).__name__ if isinstance(outcome, BaseException) else "output"
        with self._lock:
            self.ends[kind] += 1

    def dropped(self) -> None:
        """Count a stream that was left."""
        with self._lock:
            self.num_dropped += 1

    def called(self, kind: str) -> None:
        """Count a change of adapters."""
        with self._lock:
            self.calls[kind] += 1

    def compared(self, num_tokens: int) -> None:
        """Count tokens that were compared."""
        with self._lock:
            self.num_tokens += num_tokens

    def fault(self, text: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self.num_faults += 1
            if len(self.faults) < 100:
                self.faults.append(text)
                print(text, file=sys.stderr, flush=True)


class Gate:
    """Lets calls in, and keeps them out while a sample is taken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_inside = 0

    def enter(self) -> bool:
        """Go in, if it is open; never waits."""
        with self._changed:
            self._num_inside += self._is_open
            return self._is_open

    def leave(self) -> None:
        """Go out."""
        with self._changed:
            self._num_inside -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[bool]:
        """Keep calls out and wait for those inside; yields whether all have left."""
        with self._changed:
            self._is_open = False
            is_empty = self._changed.wait_for(lambda: not self._num_inside, LOST)
        try:
            yield is_empty
        finally:
            with self._changed:
                self._is_open = True


@frozen
class Traffic:
    """Callers of one engine, in threads and coroutines, until ``stop``.

    Attributes:
        engine: The engine.
        names: The adapters' names, the most popular first.
        contents: What names may stand for.
        texts: What each content answers alone.
        broken: Folders of adapters that must be refused.
        versions: The content of each version.
        pause: Seconds between a caller's requests, in the mean.
        too_long: A prompt that no request may have.
    """

    engine: QuantizedLoRAEngine
    names: Sequence[str]
    contents: Sequence[Content]
    texts: Texts
    broken: Sequence[Path]
    versions: Versions
    pause: float
    too_long: str
    ledger: Ledger = field(factory=Ledger)
    gate: Gate = field(factory=Gate)
    _stop: threading.Event = field(factory=threading.Event)
    _threads: list[threading.Thread] = field(factory=list)

    def start(self, *, num_threads: int, num_coroutines: int, num_operators: int) -> None:
        """Begin; each caller draws from a seed of its own."""
        seeds = itertools.count()
        bodies: list[Callable[[], None]] = [
            *[self._caller(Caller(self, next(seeds))) for _ in range(num_threads)],
            *[self._caller(Operator(self, next(seeds))) for _ in range(num_operators)],
            lambda: asyncio.run(self._coroutines([next(seeds) for _ in range(num_coroutines)])),
        ]
        self._threads.extend(threading.Thread(target=body, daemon=True) for body in bodies)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all callers, and wait for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(LOST)
            if thread.is_alive():
                self.ledger.fault("a caller hangs")

    def _caller(self, caller: Caller | Operator) -> Callable[[], None]:
        def run() -> None:
            while not self._stop.wait(caller.random.expovariate(1 / self.pause)):
                if not self.gate.enter():
                    continue
                try:
                    caller.call()
                except BaseException as error:
                    self.ledger.fault(f"a call raised {error!r}")
                finally:
                    self.gate.leave()

        return run

    async def _coroutines(self, seeds: Sequence[int]) -> None:
        await asyncio.gather(*(self._coroutine(Caller(self, seed)) for seed in seeds))

    async def _coroutine(self, caller: Caller) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(caller.random.expovariate(1 / self.pause))
            if not self.gate.enter():
                continue
            try:
                await caller.call_async()
            except BaseException as error:
                self.ledger.fault(f"a coroutine's call raised {error!r}")
            finally:
                self.gate.leave()

    def popular(self, chosen: random.Random) -> str:
        """Draw a name, the first most often (Zipf)."""
        return chosen.choices(self.names, [1 / (rank + 1) for rank in range(len(self.names))])[0]

    def check(self, output: GenerationOutput, question: Question) -> None:
        """Compare an output with that of its version alone."""
        try:
            content = self.versions.content_of(output.adapter_id)
        except LookupError as error:
            self.ledger.fault(str(error))
            return
        alone = self.texts[content, question.prompt]
        self.ledger.compared(min(alone.num_sure, len(output.token_ids)))
        if not alone.agrees(output):
            self.ledger.fault(
                f"{question.adapter} (version {output.adapter_id}, content {content}) answered {question.prompt!r} "
                f"with {output.text!r}, and alone, in {alone.num_sure} sure tokens, with {alone.text!r}"
            )
        if output.finished and len(output.token_ids) != question.max_tokens:
            self.ledger.fault(f"{len(output.token_ids)} tokens of {question.max_tokens} for {question}")
        if output.adapter != question.adapter and question.manner != "exact":
            self.ledger.fault(f"{output.adapter} answered for {question.adapter}")


class Caller:
    """Makes requests, one after the other; the random numbers decide which."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self.random = random.Random(seed)
        self._traffic = traffic
        self._engine = traffic.engine
        self._ledger = traffic.ledger

    def call(self) -> None:
        """Make one request, or several, from a thread."""
        if self.random.random() < 0.1:
            self._ask_several()
            return
        question = self._draw()
        handle = self._submit(question)
        if handle is None:
            return
        if question.manner == "drop":
            self._drop(handle, question)
            return
        was_cancelled = self._cancel(handle, question, time.sleep) if question.manner == "cancel" else None
        with self._end(handle, question, was_cancelled) as end:
            if question.manner == "stream":
                self._read(handle, question)
            end(handle.result(LOST))

    async def call_async(self) -> None:
        """Make one request from a coroutine."""
        question = self._draw()
        handle = self._submit(question, block=False)
        if handle is None:
            return
        if question.manner == "drop":
            await self._drop_async(handle, question)
            return
        if question.manner == "cancel":
            await asyncio.sleep(question.pause)
        was_cancelled = self._cancel(handle, question) if question.manner == "cancel" else None
        with self._end(handle, question, was_cancelled) as end:
            if question.manner == "stream":
                await self._read_async(handle, question)
            end(await asyncio.wait_for(handle, LOST))

    def _draw(self) -> Question:
        chosen = self.random
        (manner,) = chosen.choices(list(MANNERS), list(MANNERS.values()))
        adapter = None if chosen.random() < 0.1 else self._traffic.popular(chosen)
        return Question(
            adapter,
            self._traffic.too_long if manner == "too long" else chosen.choice(PROMPTS),
            chosen.randint(SHORTEST, LONGEST),
            manner,
            timeout=chosen.choice([0.001, 0.05, 0.5, 2.0]) if manner == "time out" else None,
            num_parts=chosen.randint(0, SHORTEST),
            pause=chosen.choice([0.0, 0.01, 0.2, 1.0]),
        )

    def _submit(self, question: Question, *, block: bool = True) -> RequestHandle | None:
        adapter, expected = question.adapter, None
        if question.manner == "exact" and adapter is not None:
            version = self.random.choice(self._engine.adapter_versions(adapter))
            adapter, expected = f"{adapter}@{version.version}", version.int_id
        try:
            handle = self._engine.add_request(
                question.prompt, greedy(question.max_tokens), adapter=adapter, timeout=question.timeout, block=block
            )
        except AdapterNotLoadedError:
            if expected is None:
                raise
            return None  # this version has gone meanwhile
        self._ledger.submitted()
        return handle

    def _ask_several(self) -> None:
        questions = [self._draw() for _ in range(3)]
        questions = [Question(q.adapter, self.random.choice(PROMPTS), q.max_tokens, "read") for q in questions]
        self._ledger.submitted(len(questions))
        outputs = self._engine.generate(
            [question.prompt for question in questions],
            [greedy(question.max_tokens) for question in questions],
            adapter=[question.adapter for question in questions],
            use_tqdm=False,
        )
        for output, question in zip(outputs, questions, strict=True):
            self._ledger.ended(output)
            self._traffic.check(output, question)

    def _cancel(
        self, handle: RequestHandle, question: Question, sleep: Callable[[float], None] = lambda _: None
    ) -> bool:
        sleep(question.pause)
        return handle.cancel()

    @contextlib.contextmanager
    def _end(
        self, handle: RequestHandle, question: Question, was_cancelled: bool | None
    ) -> Iterator[Callable[[GenerationOutput], None]]:
        """Count the end of a request, whichever it is, and compare it with the one that was due."""
        outcomes: list[GenerationOutput | BaseException] = []
        try:
            yield outcomes.append
        except QLoRAInferError as error:
            outcomes.append(error)
        except TimeoutError:
            self._ledger.fault(f"{question} has not ended within {LOST} s")
            return
        (outcome,) = outcomes
        self._ledger.ended(outcome)
        if not _is_due(outcome, question, was_cancelled):
            self._ledger.fault(f"{question} ended with {outcome!r}")
        if _outcome(handle) is not outcome:
            self._ledger.fault(f"{question} ended twice: {outcome!r}, {_outcome(handle)!r}")
        if not isinstance(outcome, BaseException):
            self._traffic.check(outcome, question)

    def _read(self, handle: RequestHandle, question: Question) -> None:
        for part in handle:
            self._traffic.check(part, question)

    async def _read_async(self, handle: RequestHandle, question: Question) -> None:
        async for part in handle:
            self._traffic.check(part, question)

    def _drop(self, handle: RequestHandle, question: Question) -> None:
        self._ledger.dropped()
        for part in itertools.islice(handle, question.num_parts):
            self._traffic.check(part, question)

    async def _drop_async(self, handle: RequestHandle, question: Question) -> None:
        self._ledger.dropped()
        num_parts = 0
        async for part in handle:
            self._traffic.check(part, question)
            num_parts += 1
            if num_parts >= question.num_parts:
                return


def _is_due(outcome: GenerationOutput | BaseException, question: Question, was_cancelled: bool | None) -> bool:
    if was_cancelled:
        return isinstance(outcome, RequestCancelledError)
    if question.manner == "too long":
        return isinstance(outcome, RequestRejectedError)
    if question.manner == "time out" and isinstance(outcome, RequestTimeoutError):
        return True
    return not isinstance(outcome, BaseException) and outcome.finished


def _outcome(handle: RequestHandle) -> GenerationOutput | BaseException:
    try:
        return handle.result(0)
    except Exception as error:
        return error


class Operator:
    """Changes adapters while requests run: one call after the other, drawn at random."""

    #: One in so many names has versions from memory; their copies cannot be made again, and take the disk's room.
    _PUSHED = 12
    _MAX_PINNED = 3

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self.random = random.Random(seed)
        self._traffic = traffic
        self._engine = traffic.engine
        self._guest = f"soak-guest-{seed}"
        self._pinned: list[str] = []
        # Read once: safetensors 0.8 keeps some bytes of each tensor that it reads, which would be growth of our own.
        self._pushed = [(content, content.tensors()) for content in self.random.choices(traffic.contents, k=8)]

    def call(self) -> None:
        """Make one change."""
        calls = [self.swap, self.push, self.roll_back, self.pin, self.unpin, self.prefetch, self.load_broken]
        chosen = self.random.choice([*calls, self.swap, self.swap, self.host_guest])
        self._traffic.ledger.called(chosen.__name__)
        chosen()

    def swap(self) -> None:
        """Replace the content of a name, sometimes only where it is still the one that was seen."""
        name, content = self.random.choice(self._traffic.names), self.random.choice(self._traffic.contents)
        expected = self._engine.adapter_versions(name)[0].version if self.random.random() < 0.3 else None
        with contextlib.suppress(AdapterConflictError):
            self._traffic.versions.add(self._engine.load_adapter(name, content.folder, expect=expected), content)

    def push(self) -> None:
        """Replace the content of a name by tensors in memory, as a trainer does."""
        name = self.random.choice(self._traffic.names[:: self._PUSHED])
        content, tensors = self.random.choice(self._pushed)
        loaded = self._engine.load_adapter(name, TensorSource(tensors, content.config()))
        self._traffic.versions.add(loaded, content)

    def roll_back(self) -> None:
        """Go back to the version before, where there is one."""
        with contextlib.suppress(AdapterNotLoadedError):
            self._engine.rollback_adapter(self._traffic.popular(self.random))

    def pin(self) -> None:
        """Pin a name, of which this operator holds a few at most."""
        if len(self._pinned) < self._MAX_PINNED:
            name = self.random.choice(self._traffic.names)
            with contextlib.suppress(AdapterLoadError):  # there is no room beside those that others pinned
                self._engine.pin_adapter(name)
                self._pinned.append(name)

    def unpin(self) -> None:
        """Unpin one of the names that this operator pinned."""
        if self._pinned:
            self._engine.unpin_adapter(self._pinned.pop(0))

    def prefetch(self) -> None:
        """Begin to read a few adapters."""
        self._engine.prefetch_adapters(self.random.choices(self._traffic.names, k=3))

    def load_broken(self) -> None:
        """Load an adapter that must be refused, under a name that goes on serving."""
        name, folder = self.random.choice(self._traffic.names), self.random.choice(self._traffic.broken)
        try:
            self._engine.load_adapter(name, folder)
        except AdapterError:
            return
        self._traffic.ledger.fault(f"the broken adapter {folder.name!r} was loaded")

    def host_guest(self) -> None:
        """Load an adapter under a new name, ask it once, and unload it; its requests are not in the ledger."""
        content = self.random.choice(self._traffic.contents)
        self._traffic.versions.add(self._engine.load_adapter(self._guest, content.folder), content)
        question = Question(self._guest, self.random.choice(PROMPTS), SHORTEST, "read")
        (output,) = self._engine.generate(
            question.prompt, greedy(question.max_tokens), adapter=self._guest, use_tqdm=False
        )
        self._traffic.check(output, question)
        self._engine.unload_adapter(self._guest)
        self._traffic.versions.forget(self._guest)


@frozen
class Counts:
    """The ends that the engine has counted, over the names that the ledger is about."""

    num_finished: int
    num_failed: int
    num_unfinished: int
    errors: Mapping[str, int]

    @classmethod
    def read(cls, stats: EngineStats, names: Sequence[str]) -> Counts:
        """Add up what the engine counts for the base model and ``names``."""
        counted = [stats.adapters[name] for name in (None, *names) if name in stats.adapters]
        errors: Counter[str] = Counter()
        for adapter in counted:
            errors.update(adapter.errors)
        return cls(
            sum(adapter.num_finished for adapter in counted),
            sum(adapter.num_failed for adapter in counted),
            sum(adapter.num_waiting + adapter.num_running for adapter in counted),
            dict(errors),
        )

    def since(self, before: Counts) -> Counts:
        """Return what was counted after ``before``."""
        errors = Counter(self.errors)
        errors.subtract(before.errors)
        return Counts(
            self.num_finished - before.num_finished,
            self.num_failed - before.num_failed,
            self.num_unfinished,
            {kind: number for kind, number in errors.items() if number},
        )


def balance(ledger: Ledger, counts: Counts) -> list[str]:
    """Compare the callers' count of ends with the engine's; returns every difference in words.

    Only the engine counts the end of a stream that was left: an output if it had finished, a cancellation otherwise.
    """
    found = []
    num_ended = counts.num_finished + counts.num_failed
    if num_ended != ledger.num_submitted or counts.num_unfinished:
        found.append(
            f"{ledger.num_submitted} requests were taken; in engine.stats(), {num_ended} have ended and "
            f"{counts.num_unfinished} have not"
        )
    num_seen = sum(ledger.ends.values()) + ledger.num_dropped
    if num_seen != ledger.num_submitted:
        found.append(f"{ledger.num_submitted} requests were taken; callers saw the ends of {num_seen}")
    theirs = Counter({"output": counts.num_finished, **counts.errors})
    for kind in sorted({*theirs, *ledger.ends}):
        slack = ledger.num_dropped if kind in ("output", RequestCancelledError.__name__) else 0
        if not ledger.ends[kind] <= theirs[kind] <= ledger.ends[kind] + slack:
            found.append(f"{kind}: callers saw {ledger.ends[kind]}, engine.stats() has {theirs[kind]}")
    return found


def too_long_prompt(max_model_len: int) -> str:
    """Return a prompt of more tokens than a request may have."""
    return " ".join(["sea"] * (max_model_len + 1))


def ledger_lines(ledger: Ledger) -> dict[str, Any]:
    """Return the counts, for a line of JSON."""
    return {
        "num_submitted": ledger.num_submitted,
        "ends": dict(ledger.ends),
        "num_dropped": ledger.num_dropped,
        "calls": dict(ledger.calls),
        "num_tokens_compared": ledger.num_tokens,
    }
