"""The iteration over many requests, with a bounded number in memory, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import wait
from itertools import islice
from queue import SimpleQueue

from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.request import GenerationOutput


def as_ended(
    handles: Iterable[RequestHandle], *, max_pending: int, in_order: bool
) -> Generator[RequestHandle, None, None]:
    """Yield handles whose requests have ended, while requests that ``handles`` has not made yet are made.

    Args:
        handles: An iterator that makes a request for each item.
        max_pending: The number of requests that run, or have ended and are not yet yielded.
        in_order: Whether handles come in the order of the requests; otherwise as they end.

    Raises:
        Exception: The errors of ``handles``. Unfinished requests are cancelled then, as they are when the caller
            stops.
    """
    source, pending = iter(handles), OrderedDict[RequestHandle, None]()  # whose oldest is found at once
    ended = SimpleQueue[RequestHandle]()

    def begin(number: int) -> None:
        for handle in islice(source, number):
            pending[handle] = None
            if not in_order:
                handle.add_done_callback(ended.put)  # type: ignore[arg-type]  # it is called with the handle

    try:
        begin(max_pending)
        while pending:
            handle = next(iter(pending)) if in_order else ended.get()
            if in_order:
                wait([handle])
            del pending[handle]
            begin(1)
            yield handle
    finally:  # Ctrl-C too: nothing of this call may show up in the next one
        for handle in pending:
            handle.cancel()


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
