"""The checks of requests' arguments: prompts, conversations, values for each prompt, priorities, timeouts."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

from attrs import field, frozen

from qlora_infer.chat.conversation import Conversation, is_conversation

#: What a prompt in the form of vLLM's mappings may have beside its text or tokens.
MEDIA_FIELDS = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "cache_salt")
#: What a conversation in the form of a mapping may have beside its messages.
CHAT_FIELDS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")

#: What an answer may have to look like, as vLLM 0.32's ``StructuredOutputsParams`` names it.
STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
STRUCTURE_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")

# The fields of older versions and of other libraries, and what to write here.
_OTHER_NAMES = {
    **{f"guided_{name}": f'write {{"structured_outputs": {{"{name}": …}}}}' for name in STRUCTURES},
    **dict.fromkeys(("guided_decoding", "response_format"), 'write {"structured_outputs": {"json": schema}}'),
    "guided_decoding_backend": 'write engine_args={"structured_outputs_config": {"backend": …}} for the engine',
    "guided_whitespace_pattern": 'write {"structured_outputs": {"whitespace_pattern": …, …}}',
    **dict.fromkeys(("max_new_tokens", "max_completion_tokens", "max_length"), "write 'max_tokens'"),
    "num_return_sequences": "write 'n'",
    "do_sample": "'temperature': 0.0 takes the most probable token",
}

# Sequences of whole numbers, which are no token ids.
_BYTES = (bytes, bytearray, memoryview)
_NO_MEDIA: Mapping[str, Any] = {}


@frozen(eq=False)
class PromptInput:
    """A prompt that is written.

    Attributes:
        prompt: Text, or token ids.
        media: Further fields of vLLM's mapping, such as ``multi_modal_data``.
    """

    prompt: str | tuple[int, ...]
    media: Mapping[str, Any] = field(default=_NO_MEDIA, repr=False)

    @classmethod
    def of(cls, prompt: Mapping[str, Any]) -> Self:
        """Read one of vLLM's mappings.

        Raises:
            TypeError: It has no text and no token ids, or something that is not among ``MEDIA_FIELDS``.
        """
        media = {name: value for name, value in prompt.items() if name in MEDIA_FIELDS}
        given = [value for name in ("prompt_token_ids", "prompt") if (value := prompt.get(name)) is not None]
        unknown = set(prompt) - {*media, "prompt", "prompt_token_ids"}
        if unknown or not given:
            raise TypeError(
                f"a prompt's mapping has 'prompt' or 'prompt_token_ids', and {', '.join(MEDIA_FIELDS)}; "
                f"this one has {', '.join(map(repr, prompt))}"
            )
        return cls(check_text(given[0]), media)


AnyPrompt: TypeAlias = PromptInput | Conversation


def check_prompt(prompt: Any) -> AnyPrompt:
    """Return one prompt: text, token ids, a conversation, or a mapping with one of these.

    Raises:
        TypeError: It is something else.
        ValueError: It is a conversation whose arguments contradict each other.
    """
    if is_conversation(prompt):
        return Conversation.of(prompt)
    if not isinstance(prompt, Mapping):
        return PromptInput(check_text(prompt))
    prompt = {name: value for name, value in prompt.items() if value is not None}  # Arrow gives a row all rows' fields
    if "messages" not in prompt:
        return PromptInput.of(prompt)
    if unknown := set(prompt) - {"messages", *CHAT_FIELDS}:
        raise TypeError(f"a conversation's mapping has 'messages' and {', '.join(CHAT_FIELDS)}, not {unknown}")
    return Conversation.of(**prompt)


def check_text(prompt: Any) -> str | tuple[int, ...]:
    """Return a text or token ids; raise ``TypeError`` for anything else."""
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, _BYTES)
        and prompt
        and set(map(type, prompt)) == {int}  # not isinstance: True is no token
    ):
        return tuple(prompt)
    raise TypeError(f"a prompt must be a string, a list of token ids, or a mapping, got {str(prompt)[:80]!r}")


def check_unknown(method: str, unknown: Mapping[str, object]) -> None:
    """Raise ``TypeError`` for arguments that a method does not have: most are sampling parameters."""
    for name, value in unknown.items():
        raise TypeError(
            f"{method}() has no argument {name!r}; sampling parameters are one argument, such as "
            f"sampling_params={{{name!r}: {value!r}}}"
        )


def prompt_list(prompts: Any) -> list[AnyPrompt]:
    """Return a list of prompts, of one or several; raise as ``check_prompt`` does."""
    if isinstance(prompts, str | Mapping):
        return [check_prompt(prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise TypeError(
            f"prompts must be a string, token ids, a mapping, or a list of them, got {type(prompts).__name__}"
        )
    if prompts and type(prompts[0]) is int:
        return [check_prompt(prompts)]
    if any(isinstance(prompt, Mapping) and "role" in prompt for prompt in prompts):
        raise TypeError("messages are no prompts: engine.chat takes a conversation, or a list of them")
    return [check_prompt(prompt) for prompt in prompts]


def conversation_list(messages: Any, **arguments: Any) -> list[Conversation]:
    """Return a list of conversations, of one or several, with the same arguments; raise as ``Conversation.of``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError(f"messages must be a conversation or a list of them, got {str(messages)[:80]!r}")
    several = [messages] if isinstance(messages[0], Mapping) else messages
    return [Conversation.of(each, **arguments) for each in several]


def one_per_prompt(argument: str, value: Any, num_prompts: int) -> list[Any]:
    """Return one value for each prompt, of one or a list; raise ``ValueError`` for a list of another length."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(f"{argument} has {len(value)} entries for {num_prompts} prompts: give one, or one per prompt")
    return list(value)


def value_per_prompt(argument: str, value: Any) -> Iterator[Any]:
    """Yield one value for each of any number of prompts: the same for all, or from an iterable.

    Raises:
        ValueError: The iterable ends before the prompts do; raised when that is seen.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        yield from itertools.repeat(value)
    yield from value
    raise ValueError(f"{argument} has fewer entries than there are prompts: give one, or one per prompt")


def check_priority(priority: Any) -> int:
    """Return a request's priority; raise ``TypeError`` if it is not a whole number."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, lower goes first, got {priority!r}")
    return priority


def check_timeout(timeout: Any) -> float | None:
    """Return a request's timeout in seconds; raise ``TypeError`` or ``ValueError`` if it is invalid."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout!r}")
    return float(timeout)


def check_sampling_fields(params: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``TypeError`` for fields that ``SamplingParams`` does not have, with the name that it has for them."""
    for name in params:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = _OTHER_NAMES.get(name) or (f"did you mean {near[0]!r}?" if near else "")
        raise TypeError(f"SamplingParams has no field {name!r}{': ' if hint else ''}{hint}")


def check_structured_outputs(value: Any) -> None:
    """Check a mapping of what answers must look like: one of ``STRUCTURES``, and vLLM's options.

    Raises:
        TypeError: It is no mapping, or has a field that there is not.
        ValueError: It has none of ``STRUCTURES``, or several.
    """
    form = f'{{"json": schema}}, with one of {", ".join(STRUCTURES)}'
    if not isinstance(value, Mapping):
        raise TypeError(f"structured_outputs must be a mapping such as {form}, got {str(value)[:80]!r}")
    if unknown := [name for name in value if name not in (*STRUCTURES, *STRUCTURE_OPTIONS)]:
        raise TypeError(f"structured_outputs has no field {unknown[0]!r}: it is a mapping such as {form}")
    if len([name for name in STRUCTURES if value.get(name) is not None]) != 1:
        raise ValueError(
            f"structured_outputs must be a mapping such as {form} and no more, got {str(dict(value))[:80]}"
        )
