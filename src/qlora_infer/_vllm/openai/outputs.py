"""Outputs as vLLM's server reads them: all at once, or the additions of each step.

Read in vLLM 0.32.0, ``vllm/outputs.py``.
"""

from __future__ import annotations

from typing import Any

from attrs import define, field
from vllm.outputs import CompletionOutput, RequestOutput

from qlora_infer.requests.request import Completion, GenerationOutput


@define
class OutputWriter:
    """Writes the outputs of one request.

    Attributes:
        request_id: The id that the server has for it.
        lora_request: Its adapter, as the server has it.
        is_delta: Whether each output has only the additions since the previous one.
    """

    request_id: str
    lora_request: Any
    is_delta: bool
    _seen: dict[int, Completion] = field(factory=dict)
    _prompt_token_ids: list[int] = field(factory=list)  # the same for all outputs, and maybe long

    def write(self, output: GenerationOutput) -> RequestOutput:
        """Return one output; of a stream, the completions that have something new."""
        self._prompt_token_ids = self._prompt_token_ids or list(output.prompt_token_ids)
        completions = [completion for completion in output.completions if self._is_new(completion)]
        written = RequestOutput(
            request_id=self.request_id,
            prompt=output.prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=output.prompt_logprobs,
            outputs=[self._write(completion) for completion in completions],
            finished=output.finished,
            lora_request=self.lora_request,
        )
        self._seen.update((completion.index, completion) for completion in completions)
        return written

    def _is_new(self, completion: Completion) -> bool:
        """Return whether a completion has changed: of one that has ended, the server would send the end again."""
        seen = self._seen.get(completion.index) if self.is_delta else None
        return seen is None or _progress(seen) != _progress(completion)

    def _write(self, completion: Completion) -> CompletionOutput:
        seen = self._seen.get(completion.index) if self.is_delta else None
        num_characters, num_tokens = (len(seen.text), len(seen.token_ids)) if seen else (0, 0)
        return CompletionOutput(
            index=completion.index,
            text=completion.text[num_characters:],
            token_ids=list(completion.token_ids[num_tokens:]),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else completion.logprobs[num_tokens:],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            lora_request=self.lora_request,
        )


def _progress(completion: Completion) -> tuple[int, int, str | None]:
    return len(completion.token_ids), len(completion.text), completion.finish_reason
