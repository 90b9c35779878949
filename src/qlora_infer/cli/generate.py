"""The command ``generate``, which prints answers to a few prompts or writes those to a file of prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import tee
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
from tqdm import tqdm

from qlora_infer.cli import start
from qlora_infer.cli.answer_file import read_answers, skip_answered, write_record
from qlora_infer.cli.prompt_lines import PromptLine, read_lines
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.requests.request import GenerationOutput

STDIN = Path("-")


@start.engine_options
def generate(
    ctx: typer.Context,
    model: start.Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Prompts as JSON lines; - for standard input.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, help="The file for the answers to --prompts; resumed if it exists."
        ),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(help="The adapter of prompts that name none; by default the only one, or the base model."),
    ] = None,
    sampling_params: start.SamplingParams = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each prompt.")] = None,
    max_pending: Annotated[int, typer.Option(min=1, help="Prompts read ahead of the answers.")] = 1024,
    adapter: start.Adapters = None,
    known_adapters: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="A folder of adapters, loaded when a prompt names them."),
    ] = None,
    *,
    options: Mapping[str, Any],
) -> None:
    """Answer prompts with a model and its adapters.

    With --prompts, each line is {"prompt": …} and can have "adapter", "sampling_params" and "id". Answers are written
    as they finish, one a line. After an interruption, run the same command again. The exit code is 0 if all lines were
    answered, 1 if some failed, and 130 after Ctrl-C.
    """
    if bool(prompt) == bool(prompts):
        raise typer.BadParameter("give either --prompt, or --prompts")
    if output and not prompts:
        raise typer.BadParameter("--output is for the answers to --prompts")
    if prompts and output and prompts.exists() and output.exists() and prompts.samefile(output):
        raise typer.BadParameter("--output is the file of the prompts")
    if use is None and adapter and len(adapter) == 1:
        use = adapter[0][0]
    given = {"known_adapters": known_adapters} if known_adapters else {}
    opening = start.start_engine(ctx, model, adapter, options, **given)
    if prompt:
        with opening as engine, start.usage_errors():
            for answer in engine.generate(prompt, sampling_params, adapter=use, timeout=timeout):
                typer.echo(answer.text)
    elif prompts:
        _answer_lines(opening, prompts, output, use, sampling_params or {}, timeout, max_pending)


def _answer_lines(
    opening: AbstractContextManager[QuantizedLoRAEngine],
    prompts: Path,
    output: Path | None,
    use: str | None,
    sampling_params: Mapping[str, Any],
    timeout: float | None,
    max_pending: int,
) -> None:
    answered = read_answers(output) if output else {}
    num_lines = None
    if prompts != STDIN:
        num_lines, num_left = _count(prompts, use, answered)
        typer.echo(f"{num_left} of {num_lines} prompts are left", err=True)
        if not num_left:
            return
    with ExitStack() as stack:
        lines = skip_answered(read_lines(stack.enter_context(_open(prompts, "rb")), adapter=use), answered)
        file = stack.enter_context(_open(output, "ab")) if output else sys.stdout.buffer
        engine = stack.enter_context(opening)
        bar = stack.enter_context(
            tqdm(total=num_lines, initial=len(answered), desc="Answered", unit="prompt", disable=None)
        )
        answers = _Answers(engine, sampling_params, timeout, file, bar)
        try:
            answers.run(lines, max_pending)
        except KeyboardInterrupt:
            if output:
                typer.echo(f"{answers.num_answered} more answers are in {output}: run the same again", err=True)
            raise
    typer.echo(f"{answers.num_answered} answered, {answers.num_failed} failed", err=True)
    raise typer.Exit(1 if answers.num_failed else 0)


def _open(path: Path, mode: Literal["rb", "ab"]) -> BinaryIO:
    if path == STDIN and mode == "rb":
        return sys.stdin.buffer
    try:
        return path.open(mode)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be opened: {error.strerror}") from error


def _count(prompts: Path, use: str | None, answered: dict[int, int]) -> tuple[int, int]:
    """Count the lines and those that are left.

    A wrong --output is reported here, before the engine starts.
    """
    num_lines = num_left = 0
    with _open(prompts, "rb") as file:
        for line in read_lines(file, adapter=use):
            num_lines += 1
            num_left += sum(1 for _ in skip_answered([line], answered))
    return num_lines, num_left


class _Answers:
    """The loop that sends lines and writes answers, whichever is due first."""

    def __init__(
        self,
        engine: QuantizedLoRAEngine,
        sampling_params: Mapping[str, Any],
        timeout: float | None,
        file: BinaryIO,
        bar: Any,
    ) -> None:
        self._engine = engine
        self._sampling_params = sampling_params
        self._timeout = timeout
        self._file = file
        self._bar = bar
        self._pending: dict[int, PromptLine] = {}
        self.num_answered = 0
        self.num_failed = 0

    def run(self, lines: Iterable[PromptLine], max_pending: int) -> None:
        """Answer all lines."""
        prompts, params, adapters = tee(self._sound(lines), 3)
        outputs = self._engine.generate_iter(
            (line.prompt for line in prompts),
            # A mapping that is empty lets an adapter's and the model's own defaults stand, as None does.
            ({**self._sampling_params, **(line.sampling_params or {})} for line in params),
            adapter=(line.adapter for line in adapters),
            timeout=self._timeout,
            in_order=False,
            max_pending=max_pending,
            on_error="return",
            use_tqdm=False,
        )
        for output in outputs:
            line = self._pending.pop(output.index)
            if output.error is None:
                self._write(line, output)
            else:
                self._fail(line, output.error)

    def _sound(self, lines: Iterable[PromptLine]) -> Iterator[PromptLine]:
        """Yield the valid lines, and write the errors of the others."""
        number = 0
        for line in lines:
            if line.fault:
                self._fail(line, ValueError(line.fault))
                continue
            self._pending[number] = line
            number += 1
            yield line

    def _write(self, line: PromptLine, output: GenerationOutput) -> None:
        fields: dict[str, Any] = {
            "text": output.text,
            "finish_reason": output.finish_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_tokens": output.num_tokens,
        }
        if output.completions[0].parsed is not None:
            calls = [call.to_message() for call in output.tool_calls]
            fields |= {"content": output.content, "reasoning": output.reasoning, "tool_calls": calls}
        if len(output.completions) > 1:
            fields["texts"] = [completion.text for completion in output.completions]
        write_record(self._file, line.record(**fields))
        self.num_answered += 1
        self._bar.update()

    def _fail(self, line: PromptLine, error: Exception) -> None:
        write_record(self._file, line.record(error=str(error), error_type=type(error).__name__))
        self.num_failed += 1
        self._bar.update()
