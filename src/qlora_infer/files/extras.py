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

from qlora_infer.chat.template import MAX_TEMPLATE_BYTES, check_template, check_template_text, template_field
from qlora_infer.display import format_names
from qlora_infer.errors import (
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    IncompatibleAdapterError,
    UnsafeAdapterError,
)
from qlora_infer.files.added_tokens import added_tokens_part, read_decoder, read_encoder, read_list
from qlora_infer.files.generation_defaults import format_value, sampling_defaults, stop_token_ids
from qlora_infer.files.kinds.pointer import in_place_of
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
        renamed_tokens: Those of them that are another name for one of the model's, and the model's own name for each;
            ``with_model_tokens`` finds them.
        special_tokens: The tokens that its ``tokenizer_config.json`` gives a role, such as ``eos_token``; its chat
            template is written for these.
        file_names: The files that it has, the digest of which belongs to its version; none that is too large, a link
            that leads nowhere, or in whose place another stands.
        left_out: The invalid files, or parts of files, that are ignored, with the reasons.
    """

    chat_template: str | None = None
    sampling_defaults: Mapping[str, float] = field(factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    added_tokens: Mapping[str, int] = field(factory=dict)
    renamed_tokens: Mapping[str, str] = field(factory=dict)
    special_tokens: Mapping[str, str] = field(factory=dict)
    file_names: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(factory=dict)

    @property
    def followed(self) -> tuple[str, ...]:
        """The files that requests follow."""
        return tuple(name for name in self.file_names if name not in self.left_out)


def read_extras(adapter: str, folder: Path, *, strict: bool = False) -> Extras:
    """Read the files beside an adapter's weights.

    PEFT reads none of these files, so that many adapters work with an invalid one. It is left out.

    Args:
        adapter: The adapter's name, for messages.
        folder: Where its files are; each of them may be missing.
        strict: Raise for an invalid file instead of leaving it out.

    Raises:
        CorruptAdapterError: If ``strict``, a file is too large or malformed, or holds a value that it may not have.
        UnsafeAdapterError: A file is a link that leaves the folder, or no regular file.
        AdapterSourceError: A file may not be or cannot be read.
    """
    reader = _Reader(adapter, folder, strict)
    for name in MAX_BYTES:
        reader.read(name)
    tokenizer_config: Mapping[str, Any] = {}
    with reader.part(TOKENIZER_CONFIG_NAME):
        tokenizer_config = reader.mapping(TOKENIZER_CONFIG_NAME)
    defaults: Mapping[str, float] = {}
    stop_ids: tuple[int, ...] = ()
    with reader.part(GENERATION_NAME):
        generation_config = reader.mapping(GENERATION_NAME)
        defaults, stop_ids = sampling_defaults(generation_config), stop_token_ids(generation_config)
    return Extras(
        chat_template=reader.chat_template(tokenizer_config),
        sampling_defaults=defaults,
        stop_token_ids=stop_ids,
        added_tokens=reader.added_tokens(tokenizer_config),
        special_tokens=reader.special_tokens(tokenizer_config),
        file_names=tuple(reader.files),
        left_out=reader.left_out,
    )


def with_sound_template(adapter: str, extras: Extras, *, strict: bool = False) -> Extras:
    """Compile the chat template, and leave it out if it is malformed.

    Raises:
        CorruptAdapterError: It is malformed, and ``strict`` is true.
        UnsafeAdapterError: It takes too much time or memory.
        MissingDependencyError: No process for templates can be started.
    """
    if extras.chat_template is None:
        return extras
    try:
        check_template(adapter, extras.chat_template)
    except CorruptAdapterError as error:
        has_file = TEMPLATE_NAME in extras.file_names
        name = TEMPLATE_NAME if has_file else f"chat_template of {TOKENIZER_CONFIG_NAME}"
        if strict:
            raise CorruptAdapterError(adapter, f"{name}: {error}") from error
        return evolve(extras, chat_template=None, left_out={**extras.left_out, name: str(error)})
    return extras


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


def mark_too_large(path: Path, max_bytes: int) -> None:
    """Replace a copy of one of these files by a hole of more bytes than it may have: ``read_extras`` leaves it out."""
    with path.open("wb") as file:
        file.truncate(max_bytes + 1)


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
    if other := in_place_of(content):
        raise CorruptAdapterError(adapter, f"{path}: {other}")
    return content


@frozen
class _Reader:
    """The files' contents, and their values."""

    adapter: str
    folder: Path
    strict: bool
    files: dict[str, bytes] = field(factory=dict, init=False)
    left_out: dict[str, str] = field(factory=dict, init=False)

    def read(self, name: str) -> None:
        """Take a file's content, if there is such a file and it can be read."""
        with self.part(name):
            content = _read(self.adapter, self.folder, name)
            if content is not None:
                self.files[name] = content

    @contextmanager
    def part(self, name: str, part: str = "") -> Iterator[None]:
        """Leave a file, or a part of it, out when an error is found in it; raise the error if strict."""
        path = self.folder / name
        try:
            yield
        except UnsafeAdapterError:
            raise
        except ValueError as error:
            corrupt = isinstance(error, CorruptAdapterError)
            if self.strict and corrupt:
                raise
            if self.strict:
                raise CorruptAdapterError(self.adapter, f"{path}: {error}") from error
            reason = str(error).removeprefix(f"{path}: ").replace(str(path), name)
            self.left_out[f"{part} of {name}" if part else name] = reason

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a JSON file's object; empty if there is no such file."""
        if name not in self.files:
            return {}
        content = parse_json(self.adapter, self.folder / name, self.files[name], any_keys=True)
        if not isinstance(content, dict):
            raise ValueError(f"it must hold a JSON object, not a {type(content).__name__}")  # noqa: TRY004
        return content

    def chat_template(self, tokenizer_config: Mapping[str, Any]) -> str | None:
        """Return the template; its own file goes before the field, as in transformers."""
        template = None
        with self.part(TOKENIZER_CONFIG_NAME, "chat_template"):
            template = template_field(tokenizer_config.get("chat_template"))
        if TEMPLATE_NAME in self.files:
            template = None
            with self.part(TEMPLATE_NAME):
                text = self.files[TEMPLATE_NAME].decode()
                template = check_template_text(text.replace("\r\n", "\n").replace("\r", "\n"))
        return template

    def added_tokens(self, tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
        """All added tokens; where the files contradict each other, tokenizer.json is the one that is used."""
        tokens: dict[str, int] = {}
        with self.part(ADDED_TOKENS_NAME):
            tokens |= read_encoder(self.mapping(ADDED_TOKENS_NAME))
        with self.part(TOKENIZER_CONFIG_NAME, "added_tokens_decoder"):
            tokens |= read_decoder(tokenizer_config.get("added_tokens_decoder") or {})
        if TOKENIZER_NAME in self.files:
            with self.part(TOKENIZER_NAME):
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
            with self.part(TOKENIZER_CONFIG_NAME, name):
                if not isinstance(text, str) or len(text) > MAX_SPECIAL_TOKEN_LENGTH:
                    raise ValueError(f"{name!r} must be a short text, got {format_value(text)}")
                text.encode()  # half of a surrogate pair, which JSON can hold, is a ValueError
                tokens[name] = text
        return tokens


def check_tokens(adapter: str, extras: Extras, vocabulary: Mapping[str, int] | None, *, strict: bool = False) -> None:
    """Check that the running model's tokenizer has the tokens that an adapter was trained with.

    A padding token that the model does not have is none of the reasons: it is in no prompt and no answer. Nor is
    another name for one of the model's tokens, whose embedding the model has.

    Args:
        adapter: The adapter's name, for the message.
        extras: The files beside the adapter's weights.
        vocabulary: All tokens of the model's tokenizer with their ids, as ``tokenizer.get_vocab()`` gives them;
            ``None`` where any token is known.
        strict: Refuse stop tokens that the model does not have, which ``with_model_tokens`` leaves out.

    Raises:
        IncompatibleAdapterError: The adapter's tokenizer adds tokens or numbers them otherwise; or, if ``strict``,
            the adapter stops at ids that the model does not have.
    """
    if vocabulary is None:
        return
    renamed = _renamed_tokens(extras, vocabulary)
    missing = [token for token in _new_tokens(extras, vocabulary) if token not in renamed]
    moved = [token for token, index in extras.added_tokens.items() if vocabulary.get(token, index) != index]
    beyond = _stops_beyond(extras, vocabulary) if strict else ""
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
            f"Its tokenizer has other ids than the model's for {len(moved)} tokens: {format_names(pairs)}; "
            "it was trained on another model or with another tokenizer."
        )
    if beyond:
        reasons.append(f"Its {GENERATION_NAME} {beyond}.")
    if reasons:
        raise IncompatibleAdapterError(adapter, reasons)


def with_model_tokens(extras: Extras, vocabulary: Mapping[str, int] | None) -> Extras:
    """Fit an adapter's tokens to the model's vocabulary.

    Stop tokens that the model does not have are left out: with ``min_tokens`` vLLM writes to the logits of each, and
    one beyond them would end the engine. The token that the adapter's tokenizer ends texts with is one of them.
    Trainers save the tokenizer beside an adapter, and hardly ever a generation config.
    """
    if vocabulary is None:
        return extras
    extras = evolve(extras, renamed_tokens=_renamed_tokens(extras, vocabulary))
    if beyond := _stops_beyond(extras, vocabulary):
        last = max(vocabulary.values(), default=-1)
        extras = evolve(
            extras,
            stop_token_ids=tuple(index for index in extras.stop_token_ids if index <= last),
            left_out={**extras.left_out, f"a part of eos_token_id of {GENERATION_NAME}": f"it {beyond}"},
        )
    name = extras.special_tokens.get("eos_token", "")
    end = vocabulary.get(extras.renamed_tokens.get(name, name))
    if end is None or end in extras.stop_token_ids:
        return extras
    return evolve(extras, stop_token_ids=(*extras.stop_token_ids, end))


def _stops_beyond(extras: Extras, vocabulary: Mapping[str, int]) -> str:
    """Describe the stop tokens that the model does not have; nothing where it has all of them."""
    last = max(vocabulary.values(), default=-1)
    beyond = [str(index) for index in extras.stop_token_ids if index > last]
    return f"stops at the token ids {format_names(beyond)}; the model's end at {last}" if beyond else ""


def _new_tokens(extras: Extras, vocabulary: Mapping[str, int]) -> Mapping[str, int]:
    """Return the added tokens that the model does not have by their names; padding is in no prompt and no answer."""
    return {
        token: index
        for token, index in extras.added_tokens.items()
        if token not in vocabulary and not _is_padding(extras, token)
    }


def _renamed_tokens(extras: Extras, vocabulary: Mapping[str, int]) -> Mapping[str, str]:
    """Return the added tokens that are another name for one of the model's, and the model's own name for each."""
    new = _new_tokens(extras, vocabulary)
    names = {index: token for token, index in vocabulary.items()} if new else {}
    return {token: names[index] for token, index in new.items() if index in names}


def _is_padding(extras: Extras, token: str) -> bool:
    """Return whether the token fills batches in training and has no other role."""
    roles = [role for role, text in extras.special_tokens.items() if text == token]
    return roles == ["pad_token"] and token not in (extras.chat_template or "")


def _name(token: str) -> str:
    return ascii(token[:80])
