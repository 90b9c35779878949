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

from qlora_infer.quantization.none import Unquantized  # isort: skip  # registered first: "auto" asks it last
from qlora_infer.quantization.awq import AWQ
from qlora_infer.quantization.bitsandbytes import BitsAndBytes
from qlora_infer.quantization.gptq import GPTQ

__all__ = [
    "AWQ",
    "GPTQ",
    "BitsAndBytes",
    "Platform",
    "QuantizationStrategy",
    "Unquantized",
    "choose",
    "register",
    "registered",
    "unregister",
]
