"""The reader of safetensors files: their headers, and a check that their numbers are finite."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from attrs import field, frozen

from qlora_infer.display import format_names
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.peft_config import parse_json

if TYPE_CHECKING:
    import numpy as np

#: The format allows 100 MB; 16 MiB are room for 100,000 tensors, and an adapter of a large model has some thousand.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSION = 1 << 31
#: Larger headers are not remembered.
_MAX_KNOWN_BYTES = 1 << 20

#: Bytes per number of the format's dtypes.
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
#: The dtypes that PEFT writes factors in, as numpy reads them; bfloat16 is the upper half of a float32.
_FLOATING = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
#: The largest number of float16, the narrowest dtype that a model computes in.
_LARGEST = 65504.0
_CHUNK = 1 << 22


@frozen
class TensorEntry:
    """One tensor, as the header says.

    Attributes:
        dtype: The format's name of its number type, such as ``"BF16"``.
        shape: Its dimensions.
        start: Where its bytes begin, counted from the end of the header.
        stop: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.stop - self.start

    @property
    def is_floating(self) -> bool:
        """True if it holds floating-point numbers that a factor may have."""
        return self.dtype in _FLOATING


def read_header(adapter: str, path: Path) -> Mapping[str, TensorEntry]:
    """Read a file's header and check that it describes the file exactly: no hole, no overlap, no byte missing.

    Raises:
        CorruptAdapterError: It does not.
    """
    return _read(adapter, path)[0]


def map_tensors(adapter: str, path: Path) -> dict[str, np.ndarray]:
    """Map a file's floating-point tensors into memory, by name; bfloat16 as 16-bit integers, whose bits are the same.

    Raises:
        CorruptAdapterError: It is not a whole safetensors file.
    """
    import numpy as np

    entries, offset = _read(adapter, path)
    if offset == path.stat().st_size:
        raise _corrupt(adapter, path, "its tensors hold no numbers")
    content = np.memmap(path, np.uint8, mode="r", offset=offset)
    return {
        name: content[entry.start : entry.stop].view(_FLOATING[entry.dtype]).reshape(entry.shape)
        for name, entry in entries.items()
        if entry.is_floating
    }


@frozen
class Computed:
    """A tensor that is computed when it is written, so that no more than one is in memory.

    Attributes:
        shape: Its dimensions.
        compute: Returns it.
        dtype: Its numbers, as numpy names them; ``"<u2"`` is bfloat16.
    """

    shape: tuple[int, ...]
    compute: Callable[[], np.ndarray]
    dtype: str = "<f4"

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * int(self.dtype[-1])

    def tobytes(self) -> bytes:
        """Return its numbers as the file has them."""
        return self.compute().astype(self.dtype, copy=False).tobytes()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray | Computed]) -> None:
    """Write a safetensors file of such tensors as ``map_tensors`` gives, or of computed ones.

    Args:
        path: The file.
        tensors: By name; 16-bit integers are bfloat16.
    """
    dtypes = {stored: name for name, stored in _FLOATING.items()}
    header = {}
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, Computed) else tensor.dtype.str
        header[name] = dtypes[dtype], tensor.shape, tensor.nbytes
    with path.open("wb") as file:
        write_header(file, header)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def write_header(file: BinaryIO, tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> None:
    """Write the beginning of a safetensors file, before the tensors in this order.

    Args:
        file: The file, which is empty.
        tensors: The dtype, shape and size in bytes of each tensor, by its name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        begin, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)


def check_finite(adapter: str, path: Path) -> frozenset[str]:
    """Look at every number of a file, a few megabytes at a time.

    Returns:
        The names of the tensors that hold nothing but zeros.

    Raises:
        CorruptAdapterError: One is not a number, infinite, or would be infinite in float16; the message names the
            tensors. Or the file has become shorter.
    """
    entries, offset = _read(adapter, path)
    bad, zeros = [], set()
    with path.open("rb") as file:
        for name, entry in entries.items():
            if not entry.is_floating:
                continue
            is_zero = True
            for numbers in _numbers(adapter, file, offset, entry):
                if not _is_finite(numbers):
                    bad.append(name)
                    break
                is_zero = is_zero and _is_zero(numbers)
            if is_zero:
                zeros.add(name)
    if bad:
        names = format_names(bad)
        raise CorruptAdapterError(
            adapter,
            f"{len(bad)} tensors hold NaN or infinity: {names} (or more than float16 holds); did its training diverge?",
        )
    return frozenset(zeros)


def _numbers(adapter: str, file: BinaryIO, offset: int, entry: TensorEntry) -> Iterator[np.ndarray]:
    import numpy as np

    file.seek(offset + entry.start)
    left = entry.num_bytes
    while left:
        content = file.read(min(left, _CHUNK))
        if not content:
            raise CorruptAdapterError(adapter, "its weights became shorter while they were read")
        left -= len(content)
        yield as_floats(np.frombuffer(content, dtype=_FLOATING[entry.dtype]))


def as_floats(numbers: np.ndarray) -> np.ndarray:
    """Return the numbers of such a tensor as ``map_tensors`` gives; those of bfloat16 become float32."""
    return (numbers.astype("<u4") << 16).view("<f4") if numbers.dtype.str == "<u2" else numbers


def _is_finite(numbers: np.ndarray) -> bool:
    return bool((abs(numbers) <= _LARGEST).all())  # false of NaN, too


def _is_zero(numbers: np.ndarray) -> bool:
    # Of a trained tensor one of the first numbers is not zero, so that the others are not looked at again.
    return not numbers[:64].any() and not numbers.any()


def _read(adapter: str, path: Path) -> tuple[Mapping[str, TensorEntry], int]:
    """Return the header and the position where the tensors begin."""
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # opened, a pipe would wait for a writer
        raise _corrupt(adapter, path, "it is no regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _corrupt(adapter, path, f"its header ends at byte {8 + length} of {size}")
        if length > MAX_HEADER_BYTES:
            raise _corrupt(adapter, path, f"its header has {length} bytes, {MAX_HEADER_BYTES} are allowed")
        header = _Header(file.read(length), size - 8 - length, adapter, path)
    parse = _known_entries if length <= _MAX_KNOWN_BYTES else _entries
    return parse(header), 8 + length


@frozen
class _Header:
    """A header's bytes and how many are behind it: whatever file two equal ones are from, they say the same."""

    content: bytes
    num_bytes: int
    adapter: str = field(eq=False)
    path: Path = field(eq=False)

    def corrupt(self, what: str) -> CorruptAdapterError:
        return _corrupt(self.adapter, self.path, what)


def _corrupt(adapter: str, path: Path, what: str) -> CorruptAdapterError:
    return CorruptAdapterError(adapter, f"{path} is not a whole safetensors file: {what}")


def _entries(header: _Header) -> Mapping[str, TensorEntry]:
    """Each tensor by its name, in the order of the header."""
    parsed = parse_json(header.adapter, header.path, header.content)
    if not isinstance(parsed, dict):
        raise header.corrupt("its header is no object")
    parsed.pop("__metadata__", None)
    if not parsed:
        raise header.corrupt("it holds no tensors")
    if len(parsed) > MAX_TENSORS:
        raise header.corrupt(f"it holds {len(parsed)} tensors, {MAX_TENSORS} are allowed")
    entries = {name: _entry(name, value, header) for name, value in parsed.items()}
    _check_layout(entries, header)
    return MappingProxyType(entries)


# Adapters of one training script have equal headers: parsed again for each, beside the steps, one of 308 tensors held
# Python's lock for 3.6 ms, half of all that reading such an adapter holds it.
_known_entries = lru_cache(maxsize=16)(_entries)


def _entry(name: str, value: object, header: _Header) -> TensorEntry:
    label = name[:120]
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise header.corrupt(f"{label} needs dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise header.corrupt(f"{label} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > 8:
        raise header.corrupt(f"{label} has the shape {str(shape)[:40]}")
    if not _is_sizes(offsets, limit=1 << 62) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise header.corrupt(f"{label} has the data_offsets {str(offsets)[:60]}")
    entry = TensorEntry(dtype, tuple(shape), *offsets)
    if entry.num_bytes != math.prod(shape) * _SIZES[dtype]:
        raise header.corrupt(f"{label} has {entry.num_bytes} bytes for {list(shape)} of {dtype}")
    return entry


def _is_sizes(value: object, limit: int = MAX_DIMENSION) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= limit for item in value)


def _check_layout(entries: Mapping[str, TensorEntry], header: _Header) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise header.corrupt(f"{name[:120]} begins at byte {entry.start}, the tensor before it ends at {end}")
        end = entry.stop
    if end != header.num_bytes:
        raise header.corrupt(f"its tensors have {end} bytes, the file holds {header.num_bytes}")
