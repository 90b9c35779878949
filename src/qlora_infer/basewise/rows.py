"""Rows of an embedding or an output layer that an adapter replaces, as LoRA factors of their differences.

PEFT 0.21.2 saves them for ``trainable_token_indices`` (``TrainableTokensLayer``, ``tuners/trainable_tokens/layer.py``)
and, whole matrices of them, for ``modules_to_save``. A row that differs from the base model's takes one rank: one
factor holds the differences, the other picks the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from qlora_infer.display import format_names
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.added_tokens import as_id
from qlora_infer.files.manifest import AdapterManifest, SavedTensor
from qlora_infer.files.safetensors import Computed, as_floats

if TYPE_CHECKING:
    import numpy as np

#: As many bytes are compared at a time.
_CHUNK = 1 << 24
#: 1 in bfloat16.
_ONE = 0x3F80


@frozen
class ChangedRows:
    """The rows of a module's weight that an adapter changes.

    Attributes:
        tensor: The adapter's tensor that has them.
        module: The base model's module that they are compared with.
        places: Their places in that tensor.
        rows: Their places in the base model's.
        num_rows: The rows that the base model has.
        size: The numbers in a row.
        is_output: Whether the module is a linear layer, whose outputs the rows are; an embedding's are its inputs.
    """

    tensor: str
    module: str
    places: tuple[int, ...]
    rows: tuple[int, ...]
    num_rows: int
    size: int
    is_output: bool

    def factors(self, tensor: np.ndarray, base: np.ndarray) -> tuple[Computed, Computed]:
        """Return A and B.

        Args:
            tensor: The adapter's tensor.
            base: The base model's weight.
        """
        rank = len(self.rows)
        difference = Computed((rank, self.size), partial(self._difference, tensor, base))
        choice = Computed((rank, self.num_rows), self._choice, "<u2")
        if self.is_output:
            return difference, _transposed(choice)
        return choice, _transposed(difference)

    def _difference(self, tensor: np.ndarray, base: np.ndarray) -> np.ndarray:
        new, old = (as_floats(rows).astype("<f4") for rows in (tensor[list(self.places)], base[list(self.rows)]))
        difference: np.ndarray = new - old
        return difference

    def _choice(self) -> np.ndarray:
        import numpy as np

        choice = np.zeros((len(self.rows), self.num_rows), "<u2")
        choice[range(len(self.rows)), list(self.rows)] = _ONE
        return choice


def _transposed(tensor: Computed) -> Computed:
    import numpy as np

    return evolve(tensor, shape=tensor.shape[::-1], compute=lambda: np.ascontiguousarray(tensor.compute().transpose()))


def differing_rows(tensor: np.ndarray, base: np.ndarray) -> list[int]:
    """Return the rows in which two matrices of one shape differ by more than the rounding of the coarser dtype."""
    found: list[int] = []
    step = max(1, _CHUNK // max(1, base[:1].nbytes, tensor[:1].nbytes))
    for start in range(0, len(base), step):
        ours, theirs = tensor[start : start + step], base[start : start + step]
        found += [start + int(row) for row in _differ(ours, theirs).nonzero()[0]]
    return found


def _differ(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return which rows differ; equal bits are the rule, and are compared fast."""
    differ: np.ndarray
    if ours.dtype == theirs.dtype:
        differ = (ours != theirs).any(axis=1)
        places = differ.nonzero()[0]
    else:
        import numpy as np

        differ = np.ones(len(ours), bool)
        places = np.arange(len(ours))
    one, other = as_floats(ours[places]), as_floats(theirs[places])
    is_equal = (one == other) | (_rounded(one, theirs) == other) | (one == _rounded(other, ours))
    differ[places] = ~is_equal.all(axis=1)
    return differ


def _rounded(numbers: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Round numbers as those of ``like`` are."""
    import numpy as np

    rounded: np.ndarray
    if like.dtype == "<u2":  # to the even one of two that are equally near
        bits = numbers.astype("<f4").view("<u4")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view("<f4")
    else:
        with np.errstate(over="ignore"):
            rounded = numbers.astype(like.dtype)
    return rounded


def read_tokens(adapter: str, manifest: AdapterManifest) -> AdapterManifest:
    """Read which tokens' rows an adapter holds.

    ``trainable_token_indices`` is a list, for the input embeddings, or maps the ends of modules' names to lists; an
    adapter of type ``TRAINABLE_TOKENS`` has ``token_indices``.

    Raises:
        CorruptAdapterError: They are no tokens, or not those of the rows.
    """
    trained = {name: tensor for name, tensor in manifest.saved.items() if tensor.kind == "trainable_tokens_delta"}
    field = "token_indices" if manifest.peft_type == "TRAINABLE_TOKENS" else "trainable_token_indices"
    said = manifest.config.get(field)
    if not trained and not said:
        return manifest
    by_name = said if isinstance(said, dict) else {"": said}
    read = {name: _with_tokens(adapter, field, tensor, by_name) for name, tensor in trained.items()}
    if not trained or (not isinstance(said, dict) and len(trained) > 1 and field == "trainable_token_indices"):
        names = format_names(tensor.module for tensor in trained.values())
        raise CorruptAdapterError(
            adapter, f"{field!r} is for one module, and the tensors are those of {names or 'none'}"
        )
    return evolve(manifest, saved={**manifest.saved, **read})


def _with_tokens(adapter: str, field: str, tensor: SavedTensor, said: Mapping[str, Any]) -> SavedTensor:
    names = [name for name in said if tensor.module.endswith(name)]
    tokens = said[names[0]] if len(names) == 1 else None
    is_list = isinstance(tokens, list) and all(as_id(token) is not None for token in tokens)
    if not isinstance(tokens, list) or not is_list or len(set(tokens)) != len(tokens):
        raise CorruptAdapterError(
            adapter, f"{field!r} must be a list of different tokens for {tensor.module}, got {str(tokens)[:80]}"
        )
    if len(tensor.shape) != 2 or tensor.shape[0] != len(tokens):
        raise CorruptAdapterError(
            adapter,
            f"{tensor.module} has rows of the shape {list(tensor.shape)} for the {len(tokens)} tokens in {field!r}",
        )
    return evolve(tensor, tokens=tuple(tokens))
