"""Adapters on ``lm_head``: log-probabilities of prompts and answers, alone and in any company, as PEFT gives them.

vLLM computes logits for one token of a request, for all tokens of a prompt, and, where tokens are drafted, for several
of an answer. Each of these rows needs its own request's adapter.
"""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm")
peft = pytest.importorskip("peft")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from engine.conftest import vllm_release  # noqa: E402
from engine.test_answers import assert_same_up_to_a_near_tie, chosen  # noqa: E402
from engine.test_life import start  # noqa: E402
from qlora_infer.adapters.effect import PROBE  # noqa: E402
from qlora_infer.demo import demo_adapters, demo_model  # noqa: E402
from qlora_infer.demo._build import dequantized_state_dict  # noqa: E402

GREEDY = {"temperature": 0.0, "max_tokens": 16, "logprobs": 5}
READ = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1}
#: The modules of the adapters that the tests make; B of ``lm_head`` alone moves log-probabilities by 0.8 nats.
HEADS = {"head": ["lm_head"], "head-and-more": ["lm_head", "q_proj"]}
#: About by how much these move log-probabilities, in nats.
EFFECT = 0.8
#: How much of an adapter's own effect may be missing, or of somebody else's there. Where the adapter is not applied, or
#: another is, it is 1 or more. In bfloat16 transformers itself is 0.04 to 0.09 away from what it gives in float32.
SHARE = 0.25
#: Drafts for texts that repeat themselves, and steps that hold no prompt of ours as a whole.
IN_PIECES = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "enable_prefix_caching": False,
}
REPEATED = "one two three four one two three four one two three four one two"


@pytest.fixture(scope="module")
def reference():
    """The dequantized model in float32, with an adapter of each kind, by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(demo_model("none"), dtype=torch.float32)
    weights = dequantized_state_dict(demo_model("awq"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    torch.manual_seed(0)
    for number, (name, modules) in enumerate(HEADS.items()):
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules)
        if number == 0:
            model = peft.PeftModel(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2 if "lm_head" in name else 0.02)
    for name, folder in demo_adapters().items():
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    """The adapters as PEFT saves them, one with the copy of the tied weight that it puts beside its factors."""
    folder = tmp_path_factory.mktemp("heads")
    for name in HEADS:
        reference.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=name == "head")
    return {name: folder / name for name in HEADS}


@pytest.fixture(scope="module")
def undrafted(engines, folders):
    """What the shared engine, which drafts no tokens, answers; here so that it is asked while it runs anyway."""
    engine = engines.get("awq")
    load(engine, folders)
    return {name: engine.generate([REPEATED, *PROBE], GREEDY, adapter=name, use_tqdm=False) for name in (None, *HEADS)}


@pytest.fixture
def heads(undrafted, awq, folders):
    """The shared engine, with these adapters."""
    load(awq, folders)
    return awq


def load(engine, folders):
    for name in folders.keys() - set(engine.adapters):
        engine.load_adapter(name, folders[name])


def theirs(reference, token_ids, adapter):
    """What transformers and PEFT give for each token of a text but the first."""
    text = torch.tensor([list(token_ids)])
    with torch.inference_mode():
        if adapter is None:
            with reference.disable_adapter():
                logits = reference(text).logits
        else:
            reference.set_adapter(adapter)
            logits = reference(text).logits
    return logits[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]


def ours(output):
    """What the engine gave for each token of a prompt but the first."""
    steps = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return torch.tensor([step[token].logprob for step, token in steps])


def is_right(reference, output):
    """Whether a prompt's log-probabilities are far nearer to its own adapter's than these are to the base model's."""
    expected = theirs(reference, output.prompt_token_ids, output.adapter)
    effect = EFFECT
    if output.adapter in HEADS:
        effect = float((expected - theirs(reference, output.prompt_token_ids, None)).abs().mean())
        assert effect > EFFECT / 2
    return float((ours(output) - expected).abs().mean()) < SHARE * effect


def is_answered_rightly(reference, output):
    """Whether the answer's log-probabilities are PEFT's."""
    expected = theirs(reference, (*output.prompt_token_ids, *output.token_ids), output.adapter)
    given = torch.tensor(chosen(output))
    return float((given - expected[-len(given) :]).abs().mean()) < SHARE * EFFECT


def read(engine, prompts, adapters):
    return engine.generate(prompts, READ, adapter=adapters, use_tqdm=False)


def test_prompts_are_read_as_peft_reads_them(heads, reference):
    """prompt_logprobs of an adapter on lm_head are PEFT's, and so are those of the answer."""
    for name in HEADS:
        for prompt in PROBE[:3]:
            (output,) = heads.generate(prompt, {**READ, **GREEDY}, adapter=name, use_tqdm=False)
            assert is_right(reference, output)
            assert is_answered_rightly(reference, output)


def test_prompts_of_everybody_in_one_batch_are_read_as_peft_reads_them(heads, reference):
    """Base, adapters with and without lm_head: each prompt of a batch has its own adapter's log-probabilities."""
    adapters = [None, "head", "pirate", "head-and-more", "head", None, "json"]
    prompts = [PROBE[place % 5] for place in range(len(adapters))]
    assert all(is_right(reference, output) for output in read(heads, prompts, adapters))


def test_base_prompts_are_untouched_by_heads_in_their_batch(heads):
    """A base prompt beside adapters on lm_head has exactly the log-probabilities that it has beside base prompts."""
    prompts = [PROBE[0]] * 4
    beside_base = read(heads, prompts, None)
    heads._backend._engine.reset_prefix_cache()
    beside_heads = read(heads, prompts, ["head", None, "head-and-more", None])
    for place in (1, 3):
        assert torch.equal(ours(beside_base[place]), ours(beside_heads[place]))
        assert beside_base[place].token_ids == beside_heads[place].token_ids


def test_many_short_prompts_of_one_batch_are_read(heads, reference):
    """Twelve prompts of three tokens, fewer than there are requests: the engine lives, and each is right."""
    texts = heads.generate(list(PROBE), {"max_tokens": 1}, use_tqdm=False)
    prompts = [list(texts[place % 5].prompt_token_ids[place : place + 3]) for place in range(12)]
    adapters = ["head", None, "head-and-more", "head"] * 3
    outputs = read(heads, prompts, adapters)
    assert heads.is_running
    given, expected, base = (torch.cat(parts) for parts in zip(*(three(reference, output) for output in outputs)))
    assert (given - expected).abs().mean() < SHARE * (expected - base).abs().mean()


def three(reference, output):
    by_base = theirs(reference, output.prompt_token_ids, None)
    return ours(output), theirs(reference, output.prompt_token_ids, output.adapter), by_base


def test_verify_adapter_reads_heads_rightly(heads):
    """verify_adapter: an adapter on lm_head does here what it does in PEFT, and that is much."""
    found = heads.verify_adapter("head", reference=demo_model("none"))
    assert found.mean_shift > 0.5
    assert found.reference_shift < 1.5 * found.reference_base_shift


def test_prompts_and_answers_of_a_busy_engine_are_those_given_alone(heads):
    """Threads that ask for prompts' and answers' log-probabilities of five adapters at once get what each gets alone."""
    names = [None, "head", "head-and-more", "pirate", "json"]
    jobs = [(prompt, name, params) for prompt in PROBE[:4] for name in names for params in (READ, GREEDY)]
    alone = [heads.generate(prompt, params, adapter=name, use_tqdm=False)[0] for prompt, name, params in jobs]
    together = [None] * len(jobs)
    places = list(range(len(jobs)))
    random.Random(0).shuffle(places)

    def ask(mine):
        for place in mine:
            prompt, name, params = jobs[place]
            together[place] = heads.add_request(prompt, params, adapter=name).result(timeout=120)

    threads = [threading.Thread(target=ask, args=(places[number::8],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, _, params), one, other in zip(jobs, alone, together, strict=True):
        assert other.adapter == one.adapter
        if params is READ:
            assert (ours(one) - ours(other)).abs().mean() < 0.1
        else:
            assert_same_up_to_a_near_tie(one, other, 0.3)


@pytest.fixture(scope="module")
def in_pieces(engines, folders, undrafted):
    """An engine that drafts tokens, and reads prompts in pieces."""
    engines.close()
    with start(adapters=folders, engine_args=IN_PIECES, max_lora_rank=8) as engine:
        yield engine


def test_drafted_tokens_are_judged_by_their_own_adapter(in_pieces, undrafted):
    """With n-gram drafts, base and adapters on lm_head together say what each says without drafts."""
    jobs = [(prompt, name) for prompt in range(1 + len(PROBE)) for name in (None, *HEADS)]
    prompts = [REPEATED, *PROBE]
    outputs = in_pieces.generate(
        [prompts[prompt] for prompt, _ in jobs], GREEDY, adapter=[name for _, name in jobs], use_tqdm=False
    )
    for (prompt, name), output in zip(jobs, outputs, strict=True):
        assert_same_up_to_a_near_tie(undrafted[name][prompt], output, 0.3)
    for name in (None, "head"):
        before = in_pieces.stats().num_steps
        (output,) = in_pieces.generate(REPEATED, GREEDY, adapter=name, use_tqdm=False)
        # Otherwise no drafted token was taken, and nothing is proven.
        assert in_pieces.stats().num_steps - before < len(output.token_ids)


def test_prompts_that_are_read_in_pieces_are_read_rightly(in_pieces, reference):
    """Prompts longer than a step, of base and adapters: log-probabilities are PEFT's over the whole length."""
    prompts = [" ".join(PROBE), " ".join(reversed(PROBE)), " ".join(PROBE[1:])]
    outputs = read(in_pieces, prompts, ["head", None, "head-and-more"])
    assert all(len(output.prompt_token_ids) > 2 * IN_PIECES["max_num_batched_tokens"] for output in outputs)
    assert all(is_right(reference, output) for output in outputs)


@pytest.mark.skipif(vllm_release() < (0, 32), reason="needs the runner that GPUs have since 0.32")
def test_the_runner_of_gpus_reads_and_drafts_rightly(engines, reference, folders):
    """vLLM's second runner, in Triton's interpreter: prompts in pieces, and drafted tokens, of base and adapters."""
    engines.close()
    jobs = [[PROBE[0], "head", 1], [PROBE[2], None, 1], [PROBE[1], "head-and-more", 1]]
    jobs += [[REPEATED, name, 12] for name in ("head", None, "head-and-more")]
    paths = {name: str(folder) for name, folder in folders.items()}
    script = Path(__file__).with_name("second_runner.py")
    command = [sys.executable, script, str(demo_model("awq")), json.dumps(jobs), json.dumps(paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert found["num_accepted"] > 5
    for (_, name, _), answer in zip(jobs, found["answers"], strict=True):
        prompt, answered = answer["prompt_token_ids"], answer["token_ids"]
        expected = theirs(reference, [*prompt, *answered], name)
        given = torch.tensor(answer["prompt_logprobs"] + answer["logprobs"])
        for part in (slice(len(prompt) - 1), slice(len(prompt) - 1, None)):
            assert (given[part] - expected[part]).abs().mean() < SHARE * EFFECT
