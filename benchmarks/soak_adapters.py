"""The adapters of soak.py: contents that each give texts of their own, and what each answers alone."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer import AdapterError, AdapterLoadError, GenerationOutput, LoadedAdapter, QuantizedLoRAEngine
from qlora_infer.demo import demo_adapters, demo_model
from qlora_infer.testing import FakeEngine, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PROMPTS = ("The capital of France is", "Tell me about the sea:", "My favourite food is")
#: Tokens of the shortest and of the longest answer.
SHORTEST, LONGEST = 8, 24


@frozen
class Content:
    """The files of an adapter, which names may stand for."""

    number: int
    folder: Path

    def tensors(self) -> dict[str, Any]:
        """Read its tensors, as a trainer has them in memory."""
        from safetensors.torch import load_file

        return dict(load_file(self.folder / WEIGHTS))

    def config(self) -> dict[str, Any]:
        """Read its configuration."""
        return dict(json.loads((self.folder / CONFIG).read_text()))


def demo_contents(number: int, folder: Path) -> list[Content]:
    """Write contents for the demo model: its adapters in turn, each with words of its own.

    Copies that are only scaled or shaken give the same few texts, and full of near ties. So one more module, the last
    layer's ``down_proj``, moves what the model is about to write towards a few tokens that no other content has.
    """
    from safetensors.torch import load_file, save_file

    words = _OwnWords.read(demo_model("awq"))
    made = []
    for index, source in zip(range(number), itertools.cycle(demo_adapters().values()), strict=False):
        content = Content(index, folder / str(index))
        shutil.copytree(source, content.folder)
        config = content.config()
        config["target_modules"] = sorted({*config["target_modules"], "down_proj"})
        (content.folder / CONFIG).write_text(json.dumps(config))
        rank = int(config["r"])
        tensors = {**load_file(source / WEIGHTS), **words.factors(index, rank, config["lora_alpha"] / rank)}
        save_file(tensors, content.folder / WEIGHTS, metadata={"format": "pt"})
        made.append(content)
    return made


@frozen
class _OwnWords:
    """The parts of the model that move its answers towards chosen tokens.

    Attributes:
        embeddings: The tokens' rows, which are also those of the head.
        norm: The weight of the norm before the head.
        module: The last layer's ``down_proj``.
        inputs: How many numbers go into it.
    """

    embeddings: Any
    norm: Any
    module: str
    inputs: int

    #: Rows that are not zero: the fewer, the rarer are two that move an answer equally far.
    _ROWS = 2
    #: How far the tokens are moved: so far that other tokens are no near tie.
    _STRENGTH = 1000.0

    @classmethod
    def read(cls, model: Path) -> _OwnWords:
        from safetensors import safe_open

        config = json.loads((model / "config.json").read_text())
        with safe_open(model / "model.safetensors", "pt") as file:
            embeddings, norm = (file.get_tensor(f"model.{name}.weight").float() for name in ("embed_tokens", "norm"))
        layer = config["num_hidden_layers"] - 1
        return cls(embeddings, norm, f"model.layers.{layer}.mlp.down_proj", config["intermediate_size"])

    def factors(self, number: int, rank: int, scaling: float) -> dict[str, Any]:
        """Return the module's two factors for content ``number``; each row of A decides on one or the other token."""
        import torch

        generator = torch.Generator().manual_seed(number)
        a = torch.randn((rank, self.inputs), generator=generator) / self.inputs**0.5
        tokens = _FIRST_TOKEN + 2 * self._ROWS * number + torch.arange(2 * self._ROWS)
        directions = torch.nn.functional.normalize(self.embeddings[tokens] * self.norm, dim=1)
        b = torch.zeros(len(self.norm), rank)
        b[:, : self._ROWS] = (directions[: self._ROWS] - directions[self._ROWS :]).T * self._STRENGTH / scaling
        prefix = f"base_model.model.{self.module}"
        return {
            f"{prefix}.lora_A.weight": a.bfloat16().contiguous(),
            f"{prefix}.lora_B.weight": b.bfloat16().contiguous(),
        }


#: The first of the tokens that contents write, after those of single bytes.
_FIRST_TOKEN = 1000


def fake_contents(number: int, folder: Path) -> list[Content]:
    """Write contents for the fake engine's model; ``ContentFake`` tells them apart by ``lora_alpha``."""
    return [
        Content(index, write_adapter(folder / str(index), seed=index, alpha=_alpha(index))) for index in range(number)
    ]


def _alpha(number: int) -> int:
    return 1 + number


class ContentFake(FakeEngine):
    """A fake engine whose answers depend on the files of the adapter's version, not on its name."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(reply=self._answer, **arguments)
        self._alphas: dict[int, float] = {}
        self._alpha: float | None = None

    def poll_loads(self) -> Mapping[Any, AdapterError | None]:
        """Read the configurations of copies on disk, which may have made room for others, as vLLM's workers do."""
        return {version: error or self._read(version) for version, error in super().poll_loads().items()}

    def _read(self, version: Any) -> AdapterError | None:
        try:
            self._alphas[version.int_id] = json.loads((version.path / CONFIG).read_text())["lora_alpha"]
        except OSError as error:
            self.remove_adapter(version)
            return AdapterLoadError(version.name, f"{version.path} cannot be read: {error}")
        return None

    def remove_adapter(self, version: Any) -> None:
        """Forget the version."""
        self._alphas.pop(version.int_id, None)
        super().remove_adapter(version)

    def add_request(self, request: Any) -> int:
        """Answer with what was read of the request's version."""
        self._alpha = self._alphas[request.adapter.int_id] if request.adapter else None
        return super().add_request(request)

    def _answer(self, prompt: str, _: str | None) -> str:
        return " ".join([f"content {self._alpha} answers"] + [prompt] * LONGEST)


def broken_adapters(sound: Content, folder: Path) -> list[Path]:
    """Write adapters that must be refused: cut short, of another shape, without a rank, without weights."""
    folders = [Path(shutil.copytree(sound.folder, folder / fault)) for fault in ("cut", "other", "unranked", "empty")]
    cut, other, unranked, empty = folders
    content = (cut / WEIGHTS).read_bytes()
    (cut / WEIGHTS).write_bytes(content[: len(content) // 2])
    write_adapter(other, modules={"transformer.h.0.attn.c_attn": (64, 192)})
    fields = {name: value for name, value in sound.config().items() if name != "r"}
    (unranked / CONFIG).write_text(json.dumps(fields))
    (empty / WEIGHTS).unlink()
    return folders


@frozen
class Alone:
    """A content's answer to a prompt, asked with nothing beside it.

    Attributes:
        text: The answer.
        token_ids: Its tokens.
        num_sure: The tokens before the first near tie, which another batch may round the other way.
    """

    text: str
    token_ids: tuple[int, ...]
    num_sure: int

    def agrees(self, output: GenerationOutput) -> bool:
        """Return whether an output, finished or not, begins as this one as far as it is sure."""
        length = min(self.num_sure, len(output.token_ids))
        return output.token_ids[:length] == self.token_ids[:length]


#: By content, ``None`` for the base model, and prompt.
Texts = Mapping[tuple[int | None, str], Alone]


def greedy(max_tokens: int, **fields: Any) -> dict[str, Any]:
    """Return the sampling parameters of a greedy answer of exactly so many tokens."""
    return {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **fields}


def ask_alone(engine: QuantizedLoRAEngine, adapter: str | None, prompt: str, *, margin: float) -> Alone:
    """Ask one question, and count the tokens before the first whose margin to the second is below ``margin`` nats."""
    (output,) = engine.generate(prompt, greedy(LONGEST, logprobs=2), adapter=adapter, use_tqdm=False)
    margins = [_margin(entry) for entry in output.completions[0].logprobs or ()]
    num_sure = next((place for place, found in enumerate(margins) if found < margin), len(margins))
    return Alone(output.text, output.token_ids, num_sure)


def _margin(logprobs: Mapping[int, Any]) -> float:
    best, second, *_ = [*sorted((entry.logprob for entry in logprobs.values()), reverse=True), float("-inf")]
    return float(best - second)


def load_all(
    engine: QuantizedLoRAEngine,
    contents: Mapping[str, Content],
    versions: Versions,
    *,
    margin: float,
    report: Callable[[str], None],
) -> dict[tuple[int | None, str], Alone]:
    """Load each name's content and ask it each prompt, one at a time."""
    texts: dict[tuple[int | None, str], Alone] = {
        (None, prompt): ask_alone(engine, None, prompt, margin=margin) for prompt in PROMPTS
    }
    for name, content in contents.items():
        versions.add(engine.load_adapter(name, content.folder), content)
        for prompt in PROMPTS:
            texts[content.number, prompt] = ask_alone(engine, name, prompt, margin=margin)
    sure = sum(alone.num_sure for alone in texts.values()) / len(texts)
    distinct = len({alone.token_ids[: alone.num_sure] for alone in texts.values()})
    report(f"{len(texts)} texts alone, {distinct} of them distinct, {sure:.1f} of {LONGEST} tokens sure in the mean")
    return texts


class Versions:
    """The content of each version, by the integer id that outputs have; of each name the newest are kept."""

    _NUM_KEPT = 32

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._contents: OrderedDict[int, int] = OrderedDict()
        self._kept: dict[str, deque[int]] = {}

    def add(self, loaded: LoadedAdapter, content: Content) -> None:
        """Note the content of a version that was loaded."""
        with self._changed:
            if loaded.int_id in self._contents:
                return
            self._contents[loaded.int_id] = content.number
            kept = self._kept.setdefault(loaded.name, deque())
            kept.append(loaded.int_id)
            if len(kept) > self._NUM_KEPT:
                del self._contents[kept.popleft()]
            self._changed.notify_all()

    def forget(self, name: str) -> None:
        """Drop all versions of a name that was unloaded."""
        with self._changed:
            for int_id in self._kept.pop(name, ()):
                del self._contents[int_id]

    def knows(self, int_id: int) -> bool:
        """Return whether a version's content was noted; ``load_adapter`` returns a moment after its name has moved."""
        with self._changed:
            return not int_id or int_id in self._contents

    def content_of(self, int_id: int, *, timeout: float = 10.0) -> int | None:
        """Return the content of a version, ``None`` for the base model, when it has been noted.

        Raises:
            LookupError: It was not, within ``timeout``.
        """
        if not int_id:
            return None
        deadline = time.monotonic() + timeout
        with self._changed:
            while int_id not in self._contents:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise LookupError(f"no call has loaded the version {int_id}")
            return self._contents[int_id]


def named(contents: Sequence[Content]) -> dict[str, Content]:
    """Name contents: the name's first version."""
    return {f"soak-{content.number}": content for content in contents}
