"""A progress bar for calls that answer many prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from qlora_infer.requests.request import GenerationOutput


def with_progress(
    outputs: Iterable[GenerationOutput], *, total: int | None, num_adapters_waiting: Callable[[], int]
) -> Iterator[GenerationOutput]:
    """Pass outputs on and show how many there were, how many tokens a second, and how many adapters wait for a slot.

    Nothing is shown where standard error is neither a terminal nor a notebook's.
    """
    from tqdm.auto import tqdm

    began = time.monotonic()
    num_prompt_tokens = num_tokens = 0
    # disable=None is tqdm's own question for a terminal; to a notebook's output it would say no.
    disable = False if _in_notebook() else None
    with tqdm(total=total, desc="Answered", unit="prompt", disable=disable, dynamic_ncols=True) as bar:
        for output in outputs:
            num_prompt_tokens += len(output.prompt_token_ids)
            num_tokens += output.num_tokens
            seconds = max(time.monotonic() - began, 1e-9)
            bar.set_postfix_str(
                f"in {num_prompt_tokens / seconds:.0f} tok/s, out {num_tokens / seconds:.0f} tok/s, "
                f"{num_adapters_waiting()} adapters waiting",
                refresh=False,
            )
            bar.update()
            yield output


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
