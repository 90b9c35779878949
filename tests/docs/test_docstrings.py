"""The docstrings of the API reference follow the same rules of prose as the pages."""

import importlib
import inspect
import re

import pytest
from doc_blocks import text_of

#: "word->advice", as codespell reads it for the pages.
AVOIDED = [line.partition("->")[0] for line in text_of("docs/.words.txt").splitlines()]


def documented():
    """Yield the public objects of the library's main modules that have a docstring, by dotted name."""
    for module in map(importlib.import_module, ("qlora_infer", "qlora_infer.testing", "qlora_infer.demo")):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found) or inspect.isclass(found):
                yield f"{module.__name__}.{name}", found
            if inspect.isclass(found):
                for member, value in vars(found).items():
                    function = getattr(value, "fget", getattr(value, "__func__", value))
                    if not member.startswith("_") and inspect.isfunction(function):
                        yield f"{module.__name__}.{name}.{member}", function


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_docstring_has_no_avoided_word(name):
    """The words of docs/.words.txt stand in code only; a first line names a thing or an act, and is no clause."""
    shown = inspect.getdoc(DOCUMENTED[name])
    assert shown, "it has no docstring"
    prose = re.sub(r"``[^`]+``|^Example:.*", "", shown, flags=re.M | re.S)
    assert [word for word in AVOIDED if re.search(rf"\b{word}\b", prose, re.I)] == []
    assert not re.match(r"(?:What|Whether|Those|Who|Where|How|When|That|Which|If) ", shown)


ENGINE = [name for name in DOCUMENTED if name.startswith("qlora_infer.QuantizedLoRAEngine.")]


@pytest.mark.parametrize("name", ENGINE)
def test_a_method_of_the_engine_describes_its_arguments(name):
    """Each parameter has its line under Args, in the order of the signature."""
    parameters = [name for name in inspect.signature(DOCUMENTED[name]).parameters if name not in {"self", "_unknown"}]
    shown = inspect.getdoc(DOCUMENTED[name]) or ""
    arguments = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", shown, re.M | re.S)
    assert re.findall(r"^ {4}(\w+): ", arguments[1] if arguments else "", re.M) == parameters
