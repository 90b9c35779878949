"""What vLLM's LoRA layers call on a GPU, compiled whole and not; prints by how much the two differ. Run by test_fused.py.

On a CPU vLLM does without Triton, unless it finds a backend for CPUs before it is imported: here there is one in name.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = triton.backends.backends["nvidia"]
    torch.cuda.get_device_capability = lambda device=None: (8, 0)

from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping

from qlora_infer._vllm.kernels.cuda.lora import FusedPunicaWrapper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 512
HIDDEN, RANK, SLOTS = 64, 8, 2
#: The outputs of a module's slices. Of so many slices as the second has, vLLM's own kernels take care.
OURS, THEIRS = (24, 48), (16, 16, 16, 16, 48)


class Layers(torch.nn.Module):
    """An embedding and a linear module, with adapters on both, as vllm/lora/layers has them."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS)
        self.wrapper = FusedPunicaWrapper(32, 8, DEVICE, lora_config=config)
        self.words, self.words_a = self.draw(VOCABULARY, HIDDEN), self.draw((SLOTS + 2) * VOCABULARY, RANK)
        self.words_b = self.draw(SLOTS, 1, HIDDEN, RANK)
        self.linear = self.draw(sum(sizes), HIDDEN)
        self.a = tuple(self.draw(SLOTS, 1, RANK, HIDDEN) for _ in sizes)
        self.b = tuple(self.draw(SLOTS, 1, size, RANK) for size in sizes)

    def draw(self, *shape):
        return (torch.randn(*shape) / 8).half().to(DEVICE)

    def step(self, *adapters):
        """Take over which adapter each token has, and return as many tokens."""
        mapping = LoRAMapping(adapters, adapters, is_prefill=True)
        self.wrapper.update_metadata(mapping, [101, 102], SLOTS + 1, VOCABULARY)
        return torch.randint(VOCABULARY, (len(adapters),), device=DEVICE)

    def forward(self, tokens):
        rows = self.wrapper._embeddings_indices[: len(tokens)]
        shrunk = torch.nn.functional.embedding(tokens + rows, self.words_a)
        x = torch.nn.functional.embedding(tokens, self.words)
        self.wrapper.add_lora_embedding(x, shrunk, self.words_b, add_input=True)
        y = torch.nn.functional.linear(x, self.linear)
        self.wrapper.add_lora_linear(y, x, self.a, self.b, 1.0, self.sizes)
        return y


def main():
    """Two models by turns, steps of several sizes and mixtures; vLLM's kernels need a GPU."""
    torch.manual_seed(0)
    for sizes in (OURS, THEIRS) if DEVICE == "cuda" else (OURS,):
        models = [Layers(sizes), Layers(sizes)]
        backend = "inductor" if DEVICE == "cuda" else "eager"
        compiled = [torch.compile(model, fullgraph=True, dynamic=True, backend=backend) for model in models]
        for adapters in [(101, 0, 102, 101), (0, 0, 101), (102,) * 9]:
            tokens = [models[0].step(*adapters), models[1].step(*reversed(adapters))]
            for model, fast, ids in zip(models, compiled, tokens):
                expected = model(ids)
                difference = float((fast(ids) - expected).norm() / expected.norm())
                sys.stdout.write(f"{difference:.6f}\n")


if __name__ == "__main__":
    main()
