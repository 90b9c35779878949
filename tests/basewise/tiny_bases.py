"""Adapters that PEFT makes on tiny models, and what PEFT computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer.adapters import preflight
from qlora_infer.adapters.preflight import Fit
from qlora_infer.adapters.served import write_served
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.files.manifest import AdapterManifest
from qlora_infer.model.checkpoint import read_checkpoint
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights
from qlora_infer.sources.folder import FolderSource


@frozen
class TinyBase:
    """A base model of a few layers.

    Attributes:
        folder: Its checkpoint.
        architecture: transformers' class.
        device: Where it is served.
    """

    folder: Path
    architecture: str
    device: str = "cuda"

    @property
    def modules(self) -> ModelModules:
        """The modules that an adapter may change."""
        return read_checkpoint(str(self.folder), device=self.device).modules

    def network(self) -> Any:
        """Return a new copy of the model, as PEFT changes the one that it is given."""
        from models import reference

        return reference.load(self.architecture, self.folder)

    def logits(self, adapter: Path | None) -> Any:
        """Return the logits of some tokens, with an adapter or without."""
        import torch
        from models import reference

        network = self.network()
        model = network if adapter is None else reference.with_adapter(network, adapter)
        with torch.no_grad():
            return model(torch.arange(60, 100)[None], use_cache=False).logits[0]

    def held_against(self, adapter: Path, store: Path, *, max_lora_rank: int = 32) -> tuple[AdapterManifest, Fit]:
        """Copy, check and hold an adapter against this model, as a running engine does."""
        copies = AdapterStore(store)
        _, manifest, _ = copies.make("odd", 1, FolderSource(adapter), allow_pickle=False)
        copies.close()
        base = BaseWeights(str(self.folder))
        return manifest, preflight.check("odd", manifest, self.modules, max_lora_rank=max_lora_rank, base=base)

    def served(self, adapter: Path, store: Path, **options: int) -> Path:
        """Return the copy of an adapter that vLLM would read; its names are transformers' here, too."""
        manifest, fit = self.held_against(adapter, store, **options)
        assert not fit.is_vllms_own(self.modules)
        return write_served("odd", manifest.folder, fit.placement, fit.conversion)


def save(base: TinyBase, config: Any, folder: Path, *, change: Any = None) -> Path:
    """Give an adapter random entries, and save what PEFT saves.

    Args:
        base: The model that it is for.
        config: Its config.
        folder: Where it is saved.
        change: Called with the PEFT model, to change what is not in the factors.
    """
    import peft
    import torch

    torch.manual_seed(0)
    model = peft.get_peft_model(base.network(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not name.endswith(".bias"):
                parameter.normal_(0.0, 0.08)
            elif "trainable_tokens_delta" in name or "vera_lambda" in name:
                parameter.add_(torch.randn_like(parameter))
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    return folder
