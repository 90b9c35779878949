"""What callers may write, one or many, made uniform; whatever is wrong is told before anything is queued."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Sequences of whole numbers, which are no token ids.
_BYTES = (bytes, bytearray, memoryview)


def checked_prompt(prompt: Any) -> str | tuple[int, ...]:
    """One prompt: text, or token ids; raises ``TypeError``."""
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, _BYTES)
        and prompt
        and set(map(type, prompt)) == {int}  # not isinstance: True is no token
    ):
        return tuple(prompt)
    raise TypeError(f"a prompt must be a string or a list of token ids, got {str(prompt)[:80]!r}")


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def prompt_list(prompts: Any) -> list[str | tuple[int, ...]]:
    """Prompts as a list, whether one was given or several; raises ``TypeError``."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise TypeError(f"prompts must be a string, token ids, or a list of them, got {type(prompts).__name__}")
    if prompts and type(prompts[0]) is int:
        return [checked_prompt(prompts)]
    return [checked_prompt(prompt) for prompt in prompts]


def conversation_list(messages: Any) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Conversations as a list, whether one was given or several; raises ``TypeError``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError(f"messages must be a conversation or a list of them, got {str(messages)[:80]!r}")
    return [messages] if isinstance(messages[0], Mapping) else messages


def one_per_prompt(argument: str, value: Any, num_prompts: int) -> list[Any]:
    """One value for each prompt, of one or a list; raises ``ValueError`` for a list of another length."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(f"{argument} has {len(value)} entries for {num_prompts} prompts: give one, or one per prompt")
    return list(value)


def along(argument: str, value: Any) -> Iterator[Any]:
    """One value for each of a number of prompts that is not known: one for all, or from an iterable.

    Raises:
        ValueError: The iterable ends before the prompts do; raised when that is seen.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        yield from itertools.repeat(value)
    yield from value
    raise ValueError(f"{argument} has fewer entries than there are prompts: give one, or one per prompt")


def checked_priority(priority: Any) -> int:
    """A request's priority; raises ``TypeError``."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, lower goes first, got {priority!r}")
    return priority


def checked_timeout(timeout: Any) -> float | None:
    """A request's timeout in seconds; raises ``TypeError`` and ``ValueError``."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout!r}")
    return float(timeout)
