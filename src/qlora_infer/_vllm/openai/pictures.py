"""The check of pictures in conversations over HTTP, before anything of them is downloaded or decoded.

Read in vLLM 0.32.0, ``vllm/renderers/chat_utils.py`` and ``vllm/multimodal/image.py``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.renderers.chat_utils import has_non_text_content

from qlora_infer._vllm.asking import chat

#: The pixels of all pictures that a request sends along; in RGB, they are 200 MB. vLLM's own limit is for each picture.
MAX_PIXELS = 1 << 26


def check_pictures(config: Any, messages: Sequence[Any]) -> None:
    """Refuse everything in messages that is neither a text nor a picture that may be read.

    Raises:
        VLLMValidationError: There is something else, a picture that would have to be downloaded, or too large a one.
    """
    parts = list(_parts(messages))
    try:
        for part in parts:
            _check_part(part)
        chat.check_media(config, messages)
        num_pixels = sum(_num_pixels(part) for part in parts)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="messages") from error
    if num_pixels > MAX_PIXELS:
        raise VLLMValidationError(
            f"the pictures have {num_pixels} pixels, and this server reads at most {MAX_PIXELS}", parameter="messages"
        )


def _parts(messages: Sequence[Any]) -> Iterator[Any]:
    """Yield the parts of contents that are not text."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if has_non_text_content([{"content": [part]}]):
                yield part


def _check_part(part: Mapping[str, Any]) -> None:
    if part.get("type", "image_url") not in ("image_url", "input_image") or not part.get("image_url"):
        raise ValueError("this server reads texts and pictures (image_url): no sounds, videos or embeddings")
    if part.get("uuid") is not None:
        # vLLM would take it for the picture's hash, and so one client's picture for another's.
        raise ValueError("a picture's uuid cannot be set here")
    if not _url(part).lower().startswith(("data:", "http:", "https:")):
        raise ValueError(f"a picture is a data: URL, or at an address on an allowed host, not {_url(part)[:80]!r}")


def _num_pixels(part: Mapping[str, Any]) -> int:
    """Return the size of a picture that is in its URL, from its header; 0 for one that is elsewhere."""
    url = _url(part)
    if not url.lower().startswith("data:"):
        return 0
    try:
        width, height = open_image(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
    except Exception as error:
        raise ValueError(f"a picture cannot be read: {error}") from error
    return int(width * height)


def _url(part: Mapping[str, Any]) -> str:
    address = part["image_url"]
    return str(address.get("url") if isinstance(address, Mapping) else address)
