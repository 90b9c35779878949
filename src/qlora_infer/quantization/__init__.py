"""Quantization strategies, one a file; the file's name is the strategy's.

To add one, write a file here (or a class in your own code) and decorate the class with ``register``.
"""

from qlora_infer.quantization._base import (
    Platform,
    QuantizationStrategy,
    choose,
    register,
    registered,
    unregister,
)

# "auto" asks the newest registration first. Of those for unquantized checkpoints it takes the last of these three.
# isort: off
from qlora_infer.quantization.none import Unquantized
from qlora_infer.quantization.fp8 import FP8
from qlora_infer.quantization.bitsandbytes import BitsAndBytes
# isort: on

from qlora_infer.quantization.auto_round import AutoRound
from qlora_infer.quantization.awq import AWQ
from qlora_infer.quantization.compressed_tensors import CompressedTensors
from qlora_infer.quantization.gguf import GGUF
from qlora_infer.quantization.gptq import GPTQ
from qlora_infer.quantization.modelopt import ModelOpt
from qlora_infer.quantization.mxfp4 import MXFP4
from qlora_infer.quantization.torchao import TorchAO

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
