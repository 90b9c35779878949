"""The commands that the documentation shows."""

import re
import shlex

from attrs import frozen
from doc_blocks import FENCE, text_of


@frozen
class Command:
    """One command of a page, as a shell would split it."""

    page: str
    program: str
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, line, page):
        """The command in a line, without variables before it; ``None`` where there is none."""
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        return cls(page, words[0].replace("python3", "python"), tuple(words[1:])) if words else None

    @property
    def script(self):
        """With ``python``, the file that it runs; ``None`` for a module or none."""
        first = self.arguments[0] if self.arguments else ""
        return first if first.endswith(".py") else None

    @property
    def options(self):
        """The long options, without their values."""
        return tuple(argument.partition("=")[0] for argument in self.arguments if re.match(r"--\w", argument))

    def after(self, option):
        """The arguments that follow ``option``, up to the next one."""
        if option not in self.arguments:
            return []
        following = self.arguments[self.arguments.index(option) + 1 :]
        end = next((place for place, argument in enumerate(following) if argument.startswith("-")), len(following))
        return list(following[:end])

    def __str__(self):
        return f"{self.page}: {' '.join((self.program, *self.arguments))}"


def commands(page, blocks):
    """The commands of a page's console blocks, and those that its sentences name."""
    lines = [line for block in blocks if block.language == "console" for line in _lines(block.code)]
    programs = "nox|python|pip|qlora-infer"
    lines += re.findall(rf"`((?:{programs}) [^`]+)`", FENCE.sub("", text_of(page)))
    parts = [part for line in lines for part in re.split(r" (?:&&|\|) ", line)]
    return [command for part in parts if (command := Command.parse(part, page)) is not None]


def _lines(code):
    lines = code.replace("\\\n", " ").splitlines()
    # Where some lines have a prompt, the others are what was printed.
    prompts = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return prompts or lines
