"""Quantization strategies, found by name or from a checkpoint's config.

To add one, write a file in ``strategies/`` (or a class in your own code) and decorate the class with ``register``.
"""

from qlora_infer.quantization.strategy import (
    Platform,
    QuantizationStrategy,
    choose,
    register,
    registered,
    unregister,
)

# "auto" asks the newest registration first. Of those for unquantized checkpoints it takes the last of these three.
# isort: off
from qlora_infer.quantization.strategies.none import Unquantized
from qlora_infer.quantization.strategies.fp8 import FP8
from qlora_infer.quantization.strategies.bitsandbytes import BitsAndBytes
# isort: on

from qlora_infer.quantization.strategies.auto_round import AutoRound
from qlora_infer.quantization.strategies.awq import AWQ
from qlora_infer.quantization.strategies.compressed_tensors import CompressedTensors
from qlora_infer.quantization.strategies.gguf import GGUF
from qlora_infer.quantization.strategies.gptq import GPTQ
from qlora_infer.quantization.strategies.modelopt import ModelOpt
from qlora_infer.quantization.strategies.mxfp4 import MXFP4
from qlora_infer.quantization.strategies.torchao import TorchAO

__all__ = [
    "AWQ",
    "FP8",
    "GGUF",
    "GPTQ",
    "MXFP4",
    "AutoRound",
    "BitsAndBytes",
    "CompressedTensors",
    "ModelOpt",
    "Platform",
    "QuantizationStrategy",
    "TorchAO",
    "Unquantized",
    "choose",
    "register",
    "registered",
    "unregister",
]
