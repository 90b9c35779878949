"""The figures of docs/security.md are the constants of the code."""

import re

import pytest
from doc_blocks import text_of

from qlora_infer.chat import process, template, worker
from qlora_infer.conversions import conversion, shards
from qlora_infer.files import added_tokens, content, extras, peft_config, safetensors
from qlora_infer.model import checkpoint
from qlora_infer.model import config as model_config
from qlora_infer.quantization import checkpoint as _checkpoint
from qlora_infer.sandbox import patterns
from qlora_infer.sources import filesystem

ROWS = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+(?: MiB| KiB| GiB| s)?) \|$", text_of("docs/security.md"), re.M))
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1, "": 1}
LIMITS = {
    "`adapter_config.json`": peft_config.MAX_CONFIG_BYTES,
    "weights": content.MAX_WEIGHTS_BYTES,
    "header of the weights": safetensors.MAX_HEADER_BYTES,
    "tensors": safetensors.MAX_TENSORS,
    "files that the weights are in": shards.MAX_SHARDS,
    "index of these files": shards.MAX_INDEX_BYTES,
    "times the bytes of its weights, after a conversion": conversion.MAX_GROWTH,
    "dimension of a tensor": safetensors.MAX_DIMENSION,
    "characters of a name in the config": peft_config.MAX_NAME_LENGTH,
    "steps of matching plain patterns with its modules": peft_config.MAX_MATCH_STEPS,
    "processor time of other regular expressions, in a process of their own": patterns.MATCH_SECONDS,
    "memory of that process": patterns.MAX_MEMORY,
    "chat template": template.MAX_TEMPLATE_BYTES,
    "`tokenizer.json`": extras.MAX_BYTES["tokenizer.json"],
    "`tokenizer_config.json`": extras.MAX_BYTES["tokenizer_config.json"],
    "`generation_config.json`": extras.MAX_BYTES["generation_config.json"],
    "added tokens": added_tokens.MAX_ADDED_TOKENS,
    "processor time for a conversation": process.RENDER_SECONDS,
    "memory of its process": worker.MAX_MEMORY,
    "processes at a time": process.MAX_PROCESSES,
    "conversation, as JSON": template.MAX_MESSAGES_BYTES,
    "silence of an HTTP server": filesystem.TIMEOUT,
    "time to connect, to open a file, or for one mebibyte": filesystem.STEP_TIMEOUT,
    "`config.json` and the files beside it": model_config.MAX_JSON_BYTES,
    "index of the weights": model_config.MAX_INDEX_BYTES,
    "objects and lists inside each other": model_config.MAX_JSON_DEPTH,
    "layers": _checkpoint.MAX_LAYERS,
    "experts of a layer": checkpoint.MAX_EXPERTS,
}


def test_the_page_has_each_limit_and_no_other():
    """No row of the page's tables of limits is without its constant, and no constant without its row."""
    assert set(ROWS) == set(LIMITS)


@pytest.mark.parametrize("what", LIMITS)
def test_a_limit_on_the_page_is_the_one_in_the_code(what):
    """A figure that is changed in one place only is noticed."""
    number, _, unit = ROWS[what].partition(" ")
    assert int(number.replace(",", "")) * UNITS[unit] == LIMITS[what]
