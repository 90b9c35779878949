"""The script of the processes that render chat templates, started by ``process.py``.

A template is a program. Jinja's sandbox keeps it from Python, not from using up time and memory, and one call into C
(``'a' * 10**9``, folded while the template is compiled) cannot be interrupted from Python. So the kernel bounds this
process: a timer whose signal ends it, and limits on its memory, files and processes.

A message is its length in four bytes and that many bytes: JSON comes in, a letter and a text go out.
"""

from __future__ import annotations

import encodings.unicode_escape
import html
import json
import pprint
import resource
import signal
import sys
import textwrap
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.constants
import jinja2.debug
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# jinja2 imports these when it needs them; by then no file can be opened any more.
_IMPORTED_EARLY = (encodings.unicode_escape, html, pprint, textwrap, jinja2.constants, jinja2.debug)

MAX_MEMORY = 512 << 20
MAX_MESSAGE_LENGTH = 500

# What became of a request, the first byte of an answer.
READY, TEXT, MALFORMED, UNSAFE, FAILED = b"R", b"T", b"S", b"U", b"F"


class _OutputTooLongError(Exception):
    pass


#: What a template is to blame for, whatever the messages are.
_LIMITS = (SecurityError, MemoryError, OverflowError, RecursionError, _OutputTooLongError)


class _Generation(Extension):
    """``{% generation %}``, by which transformers finds the assistant's tokens in training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (``utils/chat_template_utils.py`` of 5.19)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_ENVIRONMENT = _environment()


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def answer(request: bytes) -> bytes:
    """Compile a template and, where the request has variables, render it."""
    fields = json.loads(request)
    try:
        template = _compile(fields["template"])
    except _LIMITS as error:
        return UNSAFE + _format_error(error)
    except Exception as error:
        return MALFORMED + _format_error(error)
    if fields["variables"] is None:
        return TEXT
    try:
        return TEXT + _render(template, fields["variables"], fields["max_characters"]).encode()
    except _LIMITS as error:
        return UNSAFE + _format_error(error)
    except Exception as error:
        return FAILED + _format_error(error)


def _render(template: jinja2.Template, variables: dict[str, Any], max_characters: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_characters:
            raise _OutputTooLongError(f"it writes more than {max_characters} characters")
    return "".join(pieces)


def _format_error(error: Exception) -> bytes:
    text = f"it needs more than {MAX_MEMORY >> 20} MiB" if isinstance(error, MemoryError) else str(error)
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    message = (line + (text or type(error).__name__))[:MAX_MESSAGE_LENGTH]
    return "".join(letter if letter.isprintable() else " " for letter in message).encode()


def _confine() -> None:
    for what, limit in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_CORE, 0),
        # Should a template break out of the sandbox: no file, no connection, no other program.
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    # The parent may have ignored or blocked it, which a child inherits.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def _read() -> bytes:
    """Return the next message; empty when the parent is gone."""
    return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4), "big"))


def _write(message: bytes) -> None:
    sys.stdout.buffer.write(len(message).to_bytes(4, "big") + message)
    sys.stdout.buffer.flush()


def main(seconds: float) -> None:
    """Answer until the parent closes the pipe; no answer may take more than ``seconds``.

    They are the processor's: on a busy machine a sound template waits for its turn, and is not hostile.
    """
    _strftime_now("%c")  # reads the time zone
    _confine()
    _write(READY)
    while request := _read():
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(result)


if __name__ == "__main__":
    main(float(sys.argv[1]))
