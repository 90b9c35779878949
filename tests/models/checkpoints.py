"""Everything that a cell of the matrix needs on disk: what vLLM reads, and what transformers and PEFT read."""

import shutil
from pathlib import Path

from attrs import frozen

from models import peft_adapters, quantized, reference, tiny
from models.peft_adapters import Recipe
from models.tiny import TinyModel


@frozen
class Checkpoint:
    """A tiny model on disk.

    Attributes:
        model: What it is.
        served: The folder that vLLM reads.
        reference: The folder that transformers reads.
        served_adapters: The adapters' folders that vLLM reads, by name.
        reference_adapters: Those that PEFT reads.
    """

    model: TinyModel
    served: Path
    reference: Path
    served_adapters: dict[str, Path]
    reference_adapters: dict[str, Path]

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that it must serve."""
        return [recipe.name for recipe in self.model.adapters]


def write(model: TinyModel, root: Path) -> Checkpoint:
    """Write a model and its adapters below ``root``."""
    plain = root / "plain"
    tiny.build(model, plain)
    served, rounded = plain, plain
    if model.quantization != "none":
        served, rounded = root / "served", root / "reference"
        quantized.quantize(plain, served, rounded, model.quantization)
    if model.rewrite is not None:
        served = root / "served"
        model.rewrite(plain, served)
    network = reference.load(model.architecture, rounded)
    recipes = (*model.adapters, *model.refused, *model.refused_on_cpu)
    made = {recipe.name: root / "peft" / recipe.name for recipe in recipes}
    for recipe in recipes:
        peft_adapters.make(recipe, network, made[recipe.name])
    served_adapters = {recipe.name: _as_served(model, recipe, made[recipe.name]) for recipe in recipes}
    return Checkpoint(model, served, rounded, served_adapters, made)


def _as_served(model: TinyModel, recipe: Recipe, folder: Path) -> Path:
    """Return the folder of an adapter under the names that the running model is given."""
    target = folder.parent.parent / "adapters" / recipe.name
    if model.rewrite_adapter is not None:
        model.rewrite_adapter(folder, target)
        return target
    if recipe.rename is None:
        return folder
    shutil.copytree(folder, target)
    peft_adapters.rename_tensors(target, recipe.rename)
    return target
