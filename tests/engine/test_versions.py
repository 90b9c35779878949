"""Versions, blends, adapters from memory and their effects, in the real vLLM."""

import json
import shutil
import threading

import psutil
import pytest
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from engine.conftest import vllm_release
from qlora_infer import BlendSource, IncompatibleAdapterError, TensorSource
from qlora_infer.demo import demo_adapters, demo_model
from qlora_infer.testing import write_adapter

GREEDY = {"temperature": 0.0, "max_tokens": 16}
PROMPT = "The capital of France is"


def answer(engine, adapter):
    return engine.generate(PROMPT, GREEDY, adapter=adapter, use_tqdm=False)[0].text


def test_fifty_replacements_under_load(awq, tmp_path):
    """Replaced fifty times while requests run: each is answered by one version only, and nothing piles up.

    Two contents take turns under one name. What a request says must be what the content of its version says, alone.
    """
    contents = ("pirate", "spanish")
    expected = {content: answer(awq, content) for content in contents}
    assert expected["pirate"][:12] != expected["spanish"][:12]
    folders = demo_adapters()
    content_of = {awq.load_adapter("habit", folders["spanish"]).int_id: "spanish"}
    answered, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            answered.append(awq.add_request(PROMPT, GREEDY, adapter="habit").result(timeout=120))

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    memory = {}
    try:
        for number in range(50):
            content = contents[number % 2]
            content_of[awq.load_adapter("habit", folders[content]).int_id] = content
            if number % 10 == 9:
                memory[number] = resident_bytes(awq)
    finally:
        stop.set()
        for thread in asking:
            thread.join(120)
    assert len({output.adapter_id for output in answered}) >= 10
    for output in answered:
        # In another batch oneDNN may round otherwise, so that a later word may differ; the habit does not.
        assert output.text[:12] == expected[content_of[output.adapter_id]][:12]
    assert len(awq.adapter_versions("habit")) == 2
    awq.unload_adapter("habit")
    assert answer(awq, "pirate") == expected["pirate"]
    assert len(list(awq._registry._store._folder.iterdir())) == len(awq.adapters)
    in_vllm = set(awq._driver.call(awq._backend._engine.list_loras))
    assert in_vllm <= {adapter.int_id for adapter in awq.adapters.values()}
    size = awq.adapters["spanish"].num_bytes
    # It goes up and down by some megabytes, with what runs at the moment.
    growth = min(memory[39], memory[49]) - min(memory[9], memory[19])
    assert growth < 15 * size, "thirty replacements kept the memory of more than fifteen"


def resident_bytes(engine):
    core = psutil.Process(engine._backend.pids[0])
    return sum(process.memory_info().rss for process in [psutil.Process(), core, *core.children(recursive=True)])


def test_a_rollback_speaks_like_the_version_before(awq):
    """name@number answers like that content while another serves, and rollback makes the name answer so again."""
    folders = demo_adapters()
    first = awq.load_adapter("habit", folders["pirate"]).version
    awq.load_adapter("habit", folders["spanish"])
    assert answer(awq, "habit") == answer(awq, "spanish")
    assert answer(awq, f"habit@{first}") == answer(awq, "pirate")
    awq.rollback_adapter("habit")
    assert answer(awq, "habit") == answer(awq, "pirate")
    awq.unload_adapter("habit")


def test_an_adapter_from_memory_speaks_like_its_files(awq):
    """A TensorSource, as a trainer has it, serves what the same adapter on disk serves."""
    folder = demo_adapters()["pirate"]
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    awq.load_adapter("pushed", TensorSource(tensors, config))
    assert answer(awq, "pushed") == answer(awq, "pirate")
    awq.unload_adapter("pushed")


def test_a_blend_of_an_adapter_with_itself_is_that_adapter(awq, tmp_path):
    """0.75 and 0.25 of one content add up to it; with TIES too; nothing of it is left of 1 and -1."""
    awq.load_adapter("twin", shutil.copytree(demo_adapters()["pirate"], tmp_path / "twin"))
    alone, base = answer(awq, "pirate"), answer(awq, None)
    awq.load_adapter("same", BlendSource({"pirate": 0.75, "twin": 0.25}))
    assert answer(awq, "same") == alone
    awq.load_adapter("none", BlendSource({"pirate": 1.0, "twin": -1.0}))
    assert answer(awq, "none") == base
    awq.load_adapter("half", BlendSource({"pirate": 0.5, "spanish": 0.5}))
    assert answer(awq, "half") not in (base, "")
    for name in ("twin", "same", "none", "half"):
        awq.unload_adapter(name)


def test_a_blend_whose_ranks_differ_by_module_is_scaled_rightly(awq):
    """Some of its modules have rank 4 and others 16 (rank_pattern): with next to nothing of spanish, pirate speaks."""
    awq.load_adapter("mostly", BlendSource({"pirate": 1.0, "spanish": 1e-9}))
    assert awq.adapters["mostly"].rank == 16
    assert answer(awq, "mostly") == answer(awq, "pirate")
    awq.unload_adapter("mostly")


def test_an_adapter_is_scaled_by_its_own_patterns_or_refused(awq, tmp_path):
    """alpha_pattern does to the bit what the same factor does in the weights; a vLLM that ignores it never serves it."""
    patterned, folded = (shutil.copytree(demo_adapters()["pirate"], tmp_path / name) for name in ("pattern", "folded"))
    config = json.loads((patterned / "adapter_config.json").read_text())
    tensors = load_file(folded / "adapter_model.safetensors")
    halved = {name: tensor / 2 if "v_proj.lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(halved, folded / "adapter_model.safetensors")

    def load(alpha):
        text = json.dumps({**config, "alpha_pattern": {"v_proj": alpha}})
        (patterned / "adapter_config.json").write_text(text)
        awq.load_adapter("patterned", patterned)

    load(config["lora_alpha"])  # a pattern that changes nothing
    assert said(awq, "patterned") == said(awq, "pirate")
    if vllm_release() < (0, 32):
        with pytest.raises(IncompatibleAdapterError, match=r"scales 30 of its modules \(.*v_proj\)"):
            load(config["lora_alpha"] / 2)
        assert said(awq, "patterned") == said(awq, "pirate")
    else:
        awq.load_adapter("folded", folded)
        load(config["lora_alpha"] / 2)
        assert said(awq, "patterned") == said(awq, "folded") != said(awq, "pirate")
        awq.unload_adapter("folded")
    awq.unload_adapter("patterned")


def said(engine, adapter):
    """The tokens and their log-probabilities."""
    (output,) = engine.generate(PROMPT, {**GREEDY, "logprobs": 0}, adapter=adapter, use_tqdm=False)
    return [(token, step[token].logprob) for token, step in zip(output.token_ids, output.logprobs, strict=True)]


@pytest.mark.timeout(600)
def test_an_adapter_does_here_what_it_does_in_peft(awq, tmp_path):
    """verify_adapter: pirate changes much, an untrained adapter nothing, and both as in transformers and PEFT."""
    found = awq.verify_adapter("pirate", reference=demo_model("none"))
    assert found.num_tokens > 80
    assert found.share_changed > 0.2
    assert found.mean_shift > 0.3
    assert found.reference_shift < 2 * found.reference_base_shift
    modules = {
        name: (shape.in_features, shape.out_features) for name, shape in awq._loader.model_modules.shapes.items()
    }
    modules = {name: shape for name, shape in modules.items() if ".layers.0." in name}
    folder = write_adapter(tmp_path / "untrained", modules=modules, rank=4, alpha=0)
    awq.load_adapter("untrained", folder)
    nothing = awq.verify_adapter("untrained")
    assert (nothing.share_changed, nothing.mean_shift) == (0.0, 0.0)
    awq.unload_adapter("untrained")


def test_what_an_adapter_carries_is_followed(awq, tmp_path):
    """Its stop tokens end its answers, its defaults shorten them, its template writes its conversations; alone its."""
    folder = shutil.copytree(demo_adapters()["pirate"], tmp_path / "pirate")
    (said,) = awq.generate(PROMPT, GREEDY, adapter="pirate", use_tqdm=False)
    stop = said.token_ids[5]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop], "max_new_tokens": 3}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    awq.load_adapter("carrying", folder)

    def ask(params, adapter="carrying"):
        return awq.generate(PROMPT, params, adapter=adapter, use_tqdm=False)[0]

    first = said.token_ids.index(stop)
    assert ask({"temperature": 0.0}).token_ids == said.token_ids[:3]
    for params in (GREEDY, SamplingParams(**GREEDY)):
        stopped = ask(params)
        assert (stopped.finish_reason, stopped.completions[0].stop_reason) == ("stop", stop)
        assert stopped.token_ids == said.token_ids[: first + 1]
    assert ask({**GREEDY, "ignore_eos": True}).token_ids[: len(said.token_ids)] == said.token_ids
    assert ask(GREEDY, adapter="pirate").token_ids == said.token_ids
    (chatted,) = awq.chat([{"role": "user", "content": PROMPT}], GREEDY, adapter="carrying", use_tqdm=False)
    assert chatted.prompt == PROMPT
    assert chatted.token_ids == stopped.token_ids
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 49152}))
    with pytest.raises(IncompatibleAdapterError, match="<tool>"):
        awq.load_adapter("carrying", folder)
    awq.unload_adapter("carrying")


def test_an_adapter_in_mlxs_form_answers_as_in_pefts(awq, tmp_path):
    """The pirate as mlx-lm would have saved it, with its factors transposed and its scale for alpha / r, is the pirate."""
    pirate = demo_adapters()["pirate"]
    config = json.loads((pirate / "adapter_config.json").read_text())
    tensors = {}
    for name, tensor in load_file(pirate / "adapter_model.safetensors").items():
        plain = name.removeprefix("base_model.model.").removesuffix(".weight").replace("lora_A", "lora_a")
        tensors[plain.replace("lora_B", "lora_b")] = tensor.T.contiguous()
    parameters = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0}
    fields = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "adapters.safetensors", metadata={"format": "mlx"})
    loaded = awq.load_adapter("mlx", tmp_path)
    assert loaded.format == "MLX"
    assert loaded.num_modules == awq.adapters["pirate"].num_modules
    assert answer(awq, "mlx") == answer(awq, "pirate") != answer(awq, None)
    awq.unload_adapter("mlx")
