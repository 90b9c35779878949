"""An adapter's files beside its weights, read without trust: chat template, generation defaults, tokens.

The formats are those that transformers 5.19 writes and reads (``tokenization_utils_base.py``,
``configuration_utils.py``); what counts as a generation default is what vLLM 0.32.0 takes from a model
(``generation_defaults.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from qlora_infer.chat.template import MAX_TEMPLATE_BYTES, check_template_text, template_field
from qlora_infer.display import format_names
from qlora_infer.errors import (
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    IncompatibleAdapterError,
)
from qlora_infer.files.added_tokens import added_tokens_part, read_decoder, read_encoder, read_list
from qlora_infer.files.generation_defaults import format_value, sampling_defaults, stop_token_ids
from qlora_infer.files.manifest import check_file
from qlora_infer.files.peft_config import parse_json

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
ADDED_TOKENS_NAME = "added_tokens.json"
TOKENIZER_NAME = "tokenizer.json"

#: The most bytes of each file. Gemma 3's tokenizer.json has 33 MB, and its tokenizer_config.json 1.2 MB.
MAX_BYTES = {
    TEMPLATE_NAME: MAX_TEMPLATE_BYTES,
    TOKENIZER_CONFIG_NAME: 8 << 20,
    GENERATION_NAME: 1 << 20,
    ADDED_TOKENS_NAME: 8 << 20,
    TOKENIZER_NAME: 64 << 20,
}
MAX_SPECIAL_TOKEN_LENGTH = 256
#: transformers' names (SPECIAL_TOKENS_ATTRIBUTES).
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@frozen
class Extras:
    """The template, defaults and tokens that an adapter carries beside config and weights; empty if it has none.

    Attributes:
        chat_template: Its chat template, the default one where it has several.
        sampling_defaults: The fields of vLLM's ``SamplingParams`` that its ``generation_config.json`` sets. As in
            vLLM ``do_sample`` is not one of them: ``{"do_sample": false, "temperature": 0.6}`` samples at 0.6.
        stop_token_ids: ``eos_token_id`` of its ``generation_config.json``, each once; ``with_end_token`` adds its
            tokenizer's.
        added_tokens: The tokens that its tokenizer adds to its vocabulary, and their ids.
        special_tokens: The tokens that its ``tokenizer_config.json`` gives a role, such as ``eos_token``; its chat
            template is written for these.
        file_names: The files that all of this was read from.
    """

    chat_template: str | None = None
    sampling_defaults: Mapping[str, float] = field(factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    added_tokens: Mapping[str, int] = field(factory=dict)
    special_tokens: Mapping[str, str] = field(factory=dict)
    file_names: tuple[str, ...] = ()


def read_extras(adapter: str, folder: Path) -> Extras:
    """Read what an adapter carries beside its weights.

    Args:
        adapter: The adapter's name, for messages.
        folder: Where its files are; each of them may be missing.

    Raises:
        CorruptAdapterError: A file is malformed, too large, or holds a value that it may not have.
        UnsafeAdapterError: A file is a link that leaves the folder, or no regular file.
        AdapterSourceError: A file may not be or cannot be read.
    """
    files = {name: content for name in MAX_BYTES if (content := _read(adapter, folder, name)) is not None}
    reader = _Reader(adapter, folder, files)
    tokenizer_config = reader.mapping(TOKENIZER_CONFIG_NAME)
    generation_config = reader.mapping(GENERATION_NAME)
    with reader.blaming(GENERATION_NAME):
        defaults, stop_ids = sampling_defaults(generation_config), stop_token_ids(generation_config)
    return Extras(
        chat_template=reader.chat_template(tokenizer_config),
        sampling_defaults=defaults,
        stop_token_ids=stop_ids,
        added_tokens=reader.added_tokens(tokenizer_config),
        special_tokens=reader.special_tokens(tokenizer_config),
        file_names=tuple(files),
    )


def extra_file(adapter: str, folder: Path, name: str) -> Path | None:
    """Return one of these files, checked by ``check_file``; ``None`` where there is none.

    Raises:
        CorruptAdapterError: It is a link that leads nowhere.
        UnsafeAdapterError: It is a link that leaves the folder, or no regular file.
        AdapterSourceError: It may not be read by this user.
    """
    if not os.path.lexists(folder / name):
        return None
    try:
        return check_file(adapter, folder, name)
    except AdapterNotFoundError as error:
        raise CorruptAdapterError(adapter, f"{folder / name} is a link that leads nowhere") from error


def _read(adapter: str, folder: Path, name: str) -> bytes | None:
    """Return a file's bytes; nothing where there is no such file."""
    path = extra_file(adapter, folder, name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            # As much as there is: read() takes the memory for all that it is asked for.
            content = file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES[name]) + 1)
    except OSError as error:
        raise AdapterSourceError(adapter, f"{path} could not be read: {error}") from error
    if len(content) > MAX_BYTES[name]:
        raise CorruptAdapterError(adapter, f"{path} is too large: it may have {MAX_BYTES[name]} bytes")
    return content


@frozen
class _Reader:
    """The files' contents, and what they say."""

    adapter: str
    folder: Path
    files: Mapping[str, bytes]

    @contextmanager
    def blaming(self, name: str) -> Iterator[None]:
        """Say which file it was that an error was found in."""
        try:
            yield
        except CorruptAdapterError:
            raise
        except ValueError as error:
            raise CorruptAdapterError(self.adapter, f"{self.folder / name}: {error}") from error

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a JSON file's object; empty if there is no such file."""
        if name not in self.files:
            return {}
        content = parse_json(self.adapter, self.folder / name, self.files[name], any_keys=True)
        with self.blaming(name):
            if not isinstance(content, dict):
                raise ValueError(f"it must hold a JSON object, not a {type(content).__name__}")  # noqa: TRY004
        return content

    def chat_template(self, tokenizer_config: Mapping[str, Any]) -> str | None:
        """Return the template; its own file goes before the field, as in transformers."""
        with self.blaming(TOKENIZER_CONFIG_NAME):
            template = template_field(tokenizer_config.get("chat_template"))
        if TEMPLATE_NAME not in self.files:
            return template
        with self.blaming(TEMPLATE_NAME):
            text = self.files[TEMPLATE_NAME].decode()
            return check_template_text(text.replace("\r\n", "\n").replace("\r", "\n"))

    def added_tokens(self, tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
        """All added tokens; where the files contradict each other, tokenizer.json is the one that is used."""
        with self.blaming(ADDED_TOKENS_NAME):
            tokens = read_encoder(self.mapping(ADDED_TOKENS_NAME))
        with self.blaming(TOKENIZER_CONFIG_NAME):
            tokens |= read_decoder(tokenizer_config.get("added_tokens_decoder") or {})
        if TOKENIZER_NAME in self.files:
            with self.blaming(TOKENIZER_NAME):
                part = added_tokens_part(self.files[TOKENIZER_NAME])
                tokens |= read_list(parse_json(self.adapter, self.folder / TOKENIZER_NAME, part, any_keys=True))
        return tokens

    def special_tokens(self, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
        """Return the texts of the tokens that have a role; each is a text, or an object with its properties."""
        tokens = {}
        for name in SPECIAL_TOKENS:
            value = tokenizer_config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if value is None:
                continue
            with self.blaming(TOKENIZER_CONFIG_NAME):
                if not isinstance(text, str) or len(text) > MAX_SPECIAL_TOKEN_LENGTH:
                    raise ValueError(f"{name!r} must be a short text, got {format_value(text)}")
                text.encode()  # half of a surrogate pair, which JSON can hold, is a ValueError
            tokens[name] = text
        return tokens


def check_tokens(adapter: str, extras: Extras, vocabulary: Mapping[str, int] | None) -> None:
    """Check that the running model's tokenizer has the tokens that an adapter was trained with.

    A padding token that the model does not have is none of the reasons: it is in no prompt and no answer.

    Args:
        adapter: The adapter's name, for the message.
        extras: What the adapter carries.
        vocabulary: All tokens of the model's tokenizer with their ids, as ``tokenizer.get_vocab()`` gives them;
            ``None`` where any token is known.

    Raises:
        IncompatibleAdapterError: The adapter's tokenizer adds tokens or numbers them otherwise, or the adapter stops
            at ids that the model does not have, which would end the engine.
    """
    if vocabulary is None:
        return
    missing = [token for token in extras.added_tokens if token not in vocabulary and not _is_padding(extras, token)]
    moved = [token for token, index in extras.added_tokens.items() if vocabulary.get(token, index) != index]
    last = max(vocabulary.values(), default=-1)
    beyond = [index for index in extras.stop_token_ids if index > last]
    reasons = []
    if missing:
        names = format_names(f"{_name(token)} ({extras.added_tokens[token]})" for token in missing)
        reasons.append(
            f"Its tokenizer adds {len(missing)} tokens that the model's does not have: {names}; vLLM serves no new "
            "token embeddings from an adapter: merge it into its base model, or train it without new tokens."
        )
    if moved:
        pairs = (f"{_name(token)} ({extras.added_tokens[token]}, here {vocabulary[token]})" for token in moved)
        reasons.append(
            f"Its tokenizer numbers {len(moved)} tokens otherwise than the model's: {format_names(pairs)}; "
            "it was trained on another model or with another tokenizer."
        )
    if beyond:
        reasons.append(
            f"Its {GENERATION_NAME} stops at the token ids {format_names(map(str, beyond))}; the model's end at {last}."
        )
    if reasons:
        raise IncompatibleAdapterError(adapter, reasons)


def with_end_token(extras: Extras, vocabulary: Mapping[str, int] | None) -> Extras:
    """Add the token that an adapter's tokenizer ends texts with to its stop tokens.

    Trainers save the tokenizer beside an adapter, and hardly ever a generation config.
    """
    end = (vocabulary or {}).get(extras.special_tokens.get("eos_token", ""))
    if end is None or end in extras.stop_token_ids:
        return extras
    return evolve(extras, stop_token_ids=(*extras.stop_token_ids, end))


def _is_padding(extras: Extras, token: str) -> bool:
    """Return whether the token fills batches in training and has no other role."""
    roles = [role for role, text in extras.special_tokens.items() if text == token]
    return roles == ["pad_token"] and token not in (extras.chat_template or "")


def _name(token: str) -> str:
    return ascii(token[:80])
