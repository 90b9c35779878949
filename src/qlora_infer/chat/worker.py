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
    """Compile a template and render it, or find its content format where the request has no variables."""
    fields = json.loads(request)
    try:
        template = _compile(fields["template"])
    except _LIMITS as error:
        return UNSAFE + _format_error(error)
    except Exception as error:
        return MALFORMED + _format_error(error)
    if fields["variables"] is None:
        return TEXT + _content_format(fields["template"])
    try:
        return TEXT + _render(template, fields["variables"], fields["max_characters"]).encode()
    except _LIMITS as error:
        return UNSAFE + _format_error(error)
    except Exception as error:
        return FAILED + _format_error(error)


def _content_format(template: str) -> bytes:
    """Return ``openai`` if the template goes through the parts of a message's content, or ``string``.

    vLLM reads it out of the template in this way (``renderers/hf.py`` of 0.32.0, ``_detect_content_format``). It is
    done here because the templates of strangers can make it slow, too.
    """
    try:
        return b"openai" if _has_content_loop(_ENVIRONMENT.parse(template)) else b"string"
    except Exception:
        return b"string"


def _has_content_loop(root: nodes.Template) -> bool:
    messages = _assigned_from(root, "messages")
    loops = [loop for loop in root.find_all(nodes.For) if any(_reads(loop.iter, name) for name in messages)]
    variables = [_name_of(loop.target) for loop in loops]
    in_macros: set[int] = set()
    parameters: dict[int, set[str]] = {}  # of macros that are called with a message's content, by their loops
    for macro in root.find_all(nodes.Macro):
        names = _content_parameters(root, macro, variables)
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            if names:
                parameters[id(loop)] = names
    for loop in root.find_all(nodes.For):
        name = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if (
            any(_reads(loop.iter, variable, "content") for variable in variables)
            or name in parameters.get(id(loop), ())
            or (name == "content" and id(loop) not in in_macros)
        ):
            _name_of(loop.target)
            return True
    return False


def _assigned_from(root: nodes.Template, name: str) -> list[str]:
    """Return a variable's name and those of the variables that it, or a part of it, is assigned to."""
    names = [name]
    for known in names:  # which grows
        for assignment in root.find_all(nodes.Assign):
            if _reads(assignment.node, known) and (found := _name_of(assignment.target)) not in names:
                names.append(found)
    return names


def _content_parameters(root: nodes.Template, macro: nodes.Macro, variables: list[str]) -> set[str]:
    """Return the parameters of a macro that are somewhere given a message's content."""
    names = [argument.name for argument in macro.args]
    found = set()
    for call in root.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [*zip(names, call.args, strict=False), *((each.key, each.value) for each in call.kwargs)]
            found |= {key for key, value in given if any(_reads(value, name, "content") for name in variables)}
    return found & set(names)


def _name_of(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise TypeError("several variables, which vLLM does not follow")
    return target.name


def _reads(node: nodes.Node | None, variable: str, key: str | None = None) -> bool:
    """Return whether an expression is a variable or its item, however it is filtered or cut."""
    if isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        return _reads(node.node, variable, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == variable
    if isinstance(node, nodes.Getitem):
        named = isinstance(node.arg, nodes.Const) and node.arg.value == key
    else:
        named = isinstance(node, nodes.Getattr) and node.attr == key
    return named and _reads_itself(node, variable)


def _reads_itself(node: Any, variable: str) -> bool:
    return isinstance(node.node, nodes.Name) and node.node.ctx == "load" and node.node.name == variable


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
