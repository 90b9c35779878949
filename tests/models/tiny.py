"""Tiny random text models: transformers' own classes from small configs, made in a second each.

Sizes differ from one another wherever they may (hidden 128, all query heads 256, feed-forward 192), so that no two
dimensions can be taken for each other, and all are multiples of 64, the group size of the 4-bit forms.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from models.peft_adapters import Recipe

VOCABULARY = 512
#: Tokens that processors look for by name; they stand before the words, and no prompt of the matrix holds them.
SPECIAL_TOKENS = (
    *("<pad>", "<s>", "</s>", "<unk>"),
    *("<image_soft_token>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n", "\n\n\n\n"),  # Gemma 3
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),  # Qwen
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),  # Pixtral
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),  # Llava, Idefics 3
)
FIRST_WORD = 64
#: A linear layer of 128 inputs then gives about what it gets: answers vary, and nothing overflows.
STANDARD_DEVIATION = 0.1

#: The sizes that most configs share.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": STANDARD_DEVIATION,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
HEADS_OF_64 = {"head_dim": 64}


@frozen
class TinyModel:
    """A tiny model of one architecture.

    Attributes:
        name: Its name in the matrix.
        architecture: transformers' class.
        config: Returns the class's config.
        quantization: The form that is served: ``"none"``, or one of ``quantized.FORMS``.
        dtype: The one that it is served in, and that its weights can be represented in. The reference is in float32.
        adapters: The adapters that must answer as PEFT says, by their recipes' names.
        refused: Adapters that vLLM cannot serve on this architecture; without ``adapters``, it serves none at all.
        refused_on_cpu: Adapters that only a GPU serves.
        save_processor: Writes the processor of a multimodal model into its folder.
        rewrite: Writes the checkpoint that vLLM reads, from that of ``architecture``; ``None`` where it is the same.
        rewrite_adapter: Does the same for an adapter.
        engine_args: Further arguments of vLLM.
    """

    name: str
    architecture: str
    config: Callable[[], Any]
    quantization: str = "none"
    dtype: str = field()
    adapters: tuple[Recipe, ...] = ()
    refused: tuple[Recipe, ...] = ()
    refused_on_cpu: tuple[Recipe, ...] = ()
    save_processor: Callable[[Path, Any], None] | None = None
    rewrite: Callable[[Path, Path], None] | None = None
    rewrite_adapter: Callable[[Path, Path], None] | None = None
    engine_args: Mapping[str, Any] = field(factory=dict)

    @dtype.default
    def _dtype(self) -> str:
        """vLLM's 4-bit kernels compute in 16 bits."""
        return "float32" if self.quantization == "none" else "bfloat16"


def build(model: TinyModel, folder: Path) -> None:
    """Write the unquantized checkpoint, with its tokenizer and processor."""
    import torch
    import transformers

    torch.manual_seed(zlib.crc32(model.name.encode()))
    network = getattr(transformers, model.architecture)(model.config()).float().eval()
    _vary_vectors(network)
    network.to(getattr(torch, model.dtype)).float()
    network.generation_config = transformers.GenerationConfig()
    network.save_pretrained(folder)
    made = tokenizer()
    made.save_pretrained(folder)
    if model.save_processor is not None:
        model.save_processor(folder, made)
    # transformers would guess a class from the config's words; the class is the one above.
    _rewrite_json(folder / "config.json", architectures=[model.architecture])


def write_without_weights(model: TinyModel, folder: Path, chat_template: str) -> None:
    """Write a model's config, tokenizer and processor: all that vLLM's renderer reads."""
    config = model.config()
    config.architectures = [model.architecture]
    config.save_pretrained(folder)
    words = tokenizer()
    words.chat_template = chat_template
    words.save_pretrained(folder)
    model.save_processor(folder, words)


def _vary_vectors(network: Any) -> None:
    """Move the weights of norms and the biases off 1 and 0, where a mistake would not show."""
    import torch

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 and name.rpartition(".")[2] in ("weight", "bias", "sinks"):
                parameter += 0.1 * torch.randn_like(parameter)


def _rewrite_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def tokenizer() -> Any:
    """Return a tokenizer of words ``w64`` to ``w511`` after the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[name for name in SPECIAL_TOKENS[4:] if name.strip()],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image>",
            "video_token": "<|video_pad|>",
        },
    )
