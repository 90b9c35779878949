"""DoRA on the real vLLM for CPUs, on quantized bases: as PEFT computes it, beside others, and as adapters come and go."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from engine.conftest import demo
from engine.test_answers import (
    BATCH_TOLERANCE,
    PEFT_TOLERANCE,
    PROMPTS,
    assert_same_up_to_a_near_tie,
    chosen,
    nf4_round_trip,
)

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

GREEDY = {"temperature": 0.0, "max_tokens": 16}
PROMPT = "The capital of France is"
#: For what does not depend on the weights.
TWO_FORMS = ("awq", "bitsandbytes")


@cache
def base(form):
    """The demo model with the weights that are served, in float32."""
    from transformers import AutoModelForCausalLM

    from qlora_infer.demo._build import dequantized_state_dict

    model = AutoModelForCausalLM.from_pretrained(demo(form).unquantized, dtype=torch.float32)
    if demo(form).quantization == "bitsandbytes":
        weights = {name: nf4_round_trip(name, tensor.bfloat16()) for name, tensor in model.state_dict().items()}
    elif form == "none":
        weights = {}
    else:
        weights = dequantized_state_dict(demo(form).served)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    return model.eval()


def dora_folder(form):
    """The pirate with magnitudes."""
    return pirate_folder(form, "use_dora")


@cache
def pirate_folder(form, option):
    """The pirate with magnitudes or biases, which PEFT has made for this form's weights and saved."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    folder = demo(form).adapters["pirate"]
    config = peft.LoraConfig.from_pretrained(folder)
    setattr(config, option, True)
    config.inference_mode = False
    model = peft.get_peft_model(base(form), config)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.15 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("lora_B.default.bias"):
                parameter.normal_(0.0, 0.005, generator=generator)
    made = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    model.save_pretrained(made, save_embedding_layers=False)
    model.unload()
    return made


def form_of(engines):
    """The form that the shared engine serves."""
    return engines._name


def logprobs(model, token_ids):
    with torch.no_grad():
        scores = model(torch.tensor([list(token_ids)])).logits[0].float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(token_ids[1:])]


def served_logprobs(output):
    """Those of a prompt's tokens and of its answer's, but for the first."""
    prompt = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return [*(step[token].logprob for step, token in prompt), *chosen(output)]


def test_a_dora_adapter_answers_as_peft_computes(engine, engines, record_property):
    """On each form of the base: log-probabilities are PEFT's on the same weights, as near as those of plain adapters.

    Without its magnitudes the adapter would be off by its effect, and without its factors, too.
    """
    found, others, most = distances_from_peft(engine, form_of(engines), dora_folder(form_of(engines)), record_property)
    middle = len(found) // 2
    assert found[most] < PEFT_TOLERANCE
    assert 5 * found[middle] < min(other[middle] for other in others)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_with_biases_answers_as_peft_computes(awq, record_property):
    """As with magnitudes: biases go the same way, of PEFT's ``lora_bias`` on layers that have none of their own."""
    found, others, most = distances_from_peft(awq, "awq", pirate_folder("awq", "lora_bias"), record_property)
    assert found[most] < PEFT_TOLERANCE
    assert 3 * found[most] < min(other[most] for other in others)


def distances_from_peft(engine, form, folder, record_property):
    """Return how far a pirate of more than factors is from PEFT's, and from the plain one and the base, sorted."""
    engine.load_adapter("odd", folder)
    outputs = engine.generate(PROMPTS, {**GREEDY, "logprobs": 0, "prompt_logprobs": 0}, adapter="odd", use_tqdm=False)
    texts = [[*output.prompt_token_ids, *output.token_ids] for output in outputs]
    ours = [logprob for output in outputs for logprob in served_logprobs(output)]
    model = base(form)
    plain = [logprob for text in texts for logprob in logprobs(model, text)]
    theirs = {}
    for name, each in (("odd", folder), ("lora", demo(form).adapters["pirate"])):
        adapted = peft.PeftModel.from_pretrained(model, each).eval()
        theirs[name] = [logprob for text in texts for logprob in logprobs(adapted, text)]
        adapted.unload()

    def distance(others):
        return sorted(abs(a - b) for a, b in zip(ours, others, strict=True))

    found, from_lora, from_base = distance(theirs["odd"]), distance(theirs["lora"]), distance(plain)
    middle, most = len(found) // 2, int(0.95 * len(found))
    record_property(
        "distance", f"{found[middle]:.3f} {found[most]:.3f}, {from_lora[middle]:.3f}, {from_base[middle]:.3f}"
    )
    return found, (from_lora, from_base), most


@pytest.mark.parametrize("engine", TWO_FORMS, indirect=True)
def test_base_lora_and_dora_in_one_batch_answer_as_alone(engine, engines):
    """Up to a near tie, as for plain adapters (``test_a_batch_of_everything_gives_what_each_gives_alone``)."""
    engine.load_adapter("dora", dora_folder(form_of(engines)))
    params = {**GREEDY, "logprobs": 5}
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, "pirate", "dora")]
    mixed = engine.generate([prompt for prompt, _ in jobs], params, adapter=[adapter for _, adapter in jobs])
    for (prompt, adapter), together in zip(jobs, mixed, strict=True):
        (alone,) = engine.generate(prompt, params, adapter=adapter, use_tqdm=False)
        assert_same_up_to_a_near_tie(alone, together, BATCH_TOLERANCE)


@pytest.mark.parametrize("engine", TWO_FORMS, indirect=True)
def test_rows_without_dora_have_the_same_bits_beside_it(engine, engines):
    """A base request and a LoRA request beside DoRA get the log-probabilities, to the last bit, that they get without."""
    engine.load_adapter("dora", dora_folder(form_of(engines)))
    params = {**GREEDY, "logprobs": 0, "ignore_eos": True}
    prompts = ["What is the capital of Germany?"] * 4
    without = engine.generate(prompts, params, adapter=[None, "pirate", "json", "spanish"])
    beside = engine.generate(prompts, params, adapter=[None, "pirate", "dora", "dora"])
    assert beside[2].token_ids == beside[3].token_ids
    for number in (0, 1):
        assert chosen(beside[number]) == chosen(without[number])


def answer(engine, adapter):
    return engine.generate(PROMPT, {**GREEDY, "logprobs": 0, "max_tokens": 6}, adapter=adapter, use_tqdm=False)[0]


def test_a_slot_forgets_the_magnitudes_of_the_adapter_before(awq, tmp_path):
    """Through more adapters than slots and than places in host memory: each answers as its content does, to the bit."""
    expected = {"pirate": chosen(answer(awq, "pirate")), "spanish": chosen(answer(awq, "spanish"))}
    awq.load_adapter("dora", dora_folder("awq"))
    expected["dora"] = chosen(answer(awq, "dora"))
    assert len({tuple(logprobs) for logprobs in expected.values()}) == 3
    folders = {**demo("awq").adapters, "dora": dora_folder("awq")}
    content_of = {f"{content}-{number}": content for number in range(7) for content in ("dora", "pirate", "spanish")}
    for name, content in content_of.items():
        awq.load_adapter(name, shutil.copytree(folders[content], tmp_path / name))
    assert len(content_of) > awq.plan.max_cpu_loras
    for _ in range(2):
        for name, content in content_of.items():
            assert chosen(answer(awq, name)) == expected[content], name
    awq.unload_adapter("dora")
    for name in ("pirate", "spanish"):
        assert chosen(answer(awq, name)) == expected[name]
    for name in content_of:
        awq.unload_adapter(name)


def test_a_name_moves_from_lora_to_dora_and_back(awq):
    """Replaced while requests run, taken back, unloaded and loaded again: each version answers as itself."""
    long = {**GREEDY, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    pirate, folders = answer(awq, "pirate"), demo("awq").adapters
    awq.load_adapter("dora", dora_folder("awq"))
    dora = answer(awq, "dora")
    first = awq.load_adapter("habit", folders["pirate"]).version
    running = awq.add_request(PROMPT, long, adapter="habit")
    awq.load_adapter("habit", dora_folder("awq"))
    assert chosen(running.result(timeout=120))[:4] == pytest.approx(chosen(pirate)[:4], abs=BATCH_TOLERANCE)
    assert chosen(answer(awq, "habit")) == chosen(dora)
    assert chosen(answer(awq, f"habit@{first}")) == chosen(pirate)
    awq.rollback_adapter("habit")
    assert chosen(answer(awq, "habit")) == chosen(pirate)
    awq.unload_adapter("habit")
    awq.load_adapter("habit", dora_folder("awq"))
    assert chosen(answer(awq, "habit")) == chosen(dora)
    awq.unload_adapter("habit")
    awq.unload_adapter("dora")


def test_verify_adapter_finds_dora_nearer_to_peft_than_to_the_base(awq):
    """The probe's log-probabilities move by the adapter, and towards PEFT's on the weights that are not quantized."""
    awq.load_adapter("dora", dora_folder("awq"))
    effect = awq.verify_adapter("dora", reference=demo("awq").unquantized)
    awq.unload_adapter("dora")
    assert effect.mean_shift > 0.1
    assert effect.reference_shift < effect.mean_shift
