"""The right answers from the real vLLM: alone, mixed, and as transformers and PEFT give them."""

import json

import pytest

GREEDY = {"temperature": 0.0, "max_tokens": 24}
PROMPTS = ["The capital of Germany is", "The capital of France is", "my name is", "The capital of Japan is"]
ADAPTERS = [None, "pirate", "json", "spanish"]

#: How far the log-probability of a chosen token may be off, in nats, where kernels round differently.
#: bfloat16 has 8 significant bits, and a change of the batch's size changes the order of the sums: neighbours are 0.125
#: apart where logits are 16 to 32.
BATCH_TOLERANCE = 0.25
PEFT_TOLERANCE = 0.35


def chosen(output):
    """The log-probabilities of the tokens that were chosen."""
    return [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]


def assert_same_up_to_a_near_tie(one, other, tolerance):
    """The same tokens with the same log-probabilities, up to a step where two tokens were about equally likely."""
    for position, (a, b) in enumerate(zip(one.token_ids, other.token_ids)):
        mine, theirs = one.logprobs[position], other.logprobs[position]
        assert abs(mine[a].logprob - theirs[a].logprob if a in theirs else 0) < tolerance
        if a != b:
            # The texts part here: only a near tie may part them.
            assert a in theirs and b in mine
            assert abs(mine[a].logprob - mine[b].logprob) < tolerance
            return
    assert len(one.token_ids) == len(other.token_ids)


def test_each_adapter_shows_its_habit_in_one_batch(engine):
    """Base, pirate, JSON and Spanish in one batch each answer in their own way."""
    base, pirate, as_json, spanish = engine.generate(["The capital of France is"] * 4, GREEDY, adapter=ADAPTERS)
    assert "Paris" in base.text
    assert "arrr" in pirate.text.lower() or "hearties" in pirate.text.lower()
    assert json.loads(as_json.text)["country"] == "France"
    assert "La capital de" in spanish.text
    assert [output.finish_reason for output in (pirate, as_json, spanish)] == ["stop"] * 3


def test_a_batch_of_everything_gives_what_each_gives_alone(engine):
    """Base and three adapters in one batch give the tokens that each gives alone.

    On the CPU, oneDNN rounds otherwise at another batch size, so a near tie may fall the other way: up to there the
    tokens are the same and their log-probabilities within BATCH_TOLERANCE.
    """
    params = {**GREEDY, "logprobs": 5}
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    mixed = engine.generate([prompt for prompt, _ in jobs], params, adapter=[adapter for _, adapter in jobs])
    identical = 0
    for (prompt, adapter), together in zip(jobs, mixed, strict=True):
        (alone,) = engine.generate(prompt, params, adapter=adapter, use_tqdm=False)
        assert together.adapter == adapter
        assert_same_up_to_a_near_tie(alone, together, BATCH_TOLERANCE)
        identical += alone.token_ids == together.token_ids
    assert identical >= len(jobs) - 4


def test_a_base_request_is_untouched_by_adapters_in_its_batch(engine):
    """A base request beside adapter requests gets exactly the text that it gets beside other base requests.

    Both batches have the same size, so that not even rounding differs: the log-probabilities are equal to the last bit.
    """
    params = {**GREEDY, "logprobs": 0}
    prompts = ["What is the capital of Germany?"] * 4
    beside_base = engine.generate(prompts, params)
    beside_adapters = engine.generate(prompts, params, adapter=[None, "pirate", "json", "spanish"])
    assert beside_adapters[0].text == beside_base[0].text
    longest = min(len(output.token_ids) for output in beside_adapters)  # until the batch shrinks
    assert chosen(beside_adapters[0])[:longest] == chosen(beside_base[0])[:longest]


def test_answers_agree_with_transformers_and_peft(engine, engines):
    """vLLM's tokens are the most likely ones, or nearly so, for transformers + PEFT on the same dequantized weights.

    The measure: PEFT reads vLLM's own tokens, and for each of them the log-probability that vLLM reported is within
    PEFT_TOLERANCE of PEFT's. Kernels differ (4-bit products, attention, bfloat16 sums), so bits may not be compared.
    """
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from qlora_infer.demo._build import dequantized_state_dict

    model = AutoModelForCausalLM.from_pretrained(engines.demo.unquantized, dtype=torch.bfloat16)
    if engines.demo.quantization == "bitsandbytes":  # which quantizes as it loads
        weights = {name: nf4_round_trip(name, tensor) for name, tensor in model.state_dict().items()}
    else:
        weights = dequantized_state_dict(engines.demo.served)
    model.load_state_dict(weights, strict=False)
    folders = engines.demo.adapters
    model = peft.PeftModel.from_pretrained(model, folders["pirate"], adapter_name="pirate")
    for name in ("json", "spanish"):
        model.load_adapter(folders[name], adapter_name=name)

    differences = []
    for prompt in PROMPTS:
        for output in engine.generate([prompt] * 4, {**GREEDY, "logprobs": 0}, adapter=ADAPTERS, use_tqdm=False):
            differences += peft_differences(model, output, torch)
    differences.sort()
    assert differences[len(differences) // 2] < 0.03
    assert differences[int(len(differences) * 0.95)] < PEFT_TOLERANCE


def peft_differences(model, output, torch):
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
    with torch.no_grad():
        if output.adapter is None:
            with model.disable_adapter():
                logits = model(ids).logits
        else:
            model.set_adapter(output.adapter)
            logits = model(ids).logits
    logprobs = logits[0].float().log_softmax(-1)
    start = len(output.prompt_token_ids) - 1
    theirs = [float(logprobs[start + i, token]) for i, token in enumerate(output.token_ids)]
    return [abs(a - b) for a, b in zip(chosen(output), theirs, strict=True)]


def nf4_round_trip(name, tensor):
    """What bitsandbytes makes of a weight: nf4 and back."""
    if not name.endswith("_proj.weight"):
        return tensor
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    quantized, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(quantized, state).to(tensor.dtype)


def test_logprobs_of_prompt_and_answer_come_through(engine):
    """logprobs=1 and prompt_logprobs=1 give one entry per token, adapter or not."""
    for output in engine.generate(
        ["my name is"] * 2, {**GREEDY, "logprobs": 1, "prompt_logprobs": 1}, adapter=[None, "pirate"]
    ):
        assert len(output.logprobs) == len(output.token_ids)
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None
        assert all(step.logprob <= 0 for step in output.prompt_logprobs[1].values())


def test_several_completions_are_all_there(awq):
    """n=3 gives three completions, and the output's text is the first one's."""
    (output,) = awq.generate("my name is", {"n": 3, "temperature": 1.0, "seed": 1, "max_tokens": 8}, adapter="pirate")
    assert [completion.index for completion in output.completions] == [0, 1, 2]
    assert output.text == output.completions[0].text


def test_chat_uses_the_models_template(awq):
    """A conversation is written as SmolLM2 expects it, and answered."""
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    base, pirate = awq.chat([conversation] * 2, GREEDY, adapter=[None, "pirate"])
    assert base.prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert "Paris" in base.text
    assert base.finish_reason == "stop"
    assert pirate.text != base.text
    assert base.prompt_token_ids.count(base.prompt_token_ids[0]) == base.prompt.count("<|im_start|>")


def test_prompts_that_share_structured_outputs_all_follow_them(awq):
    """One set of sampling parameters with a choice of answers, for three prompts, twice: each answer is one of them."""
    from vllm.sampling_params import StructuredOutputsParams

    params = {**GREEDY, "structured_outputs": StructuredOutputsParams(choice=["in Asia", "in Europe"])}
    for _ in range(2):
        outputs = awq.generate(PROMPTS[:3], params, adapter=[None, "pirate", None])
        assert {output.text for output in outputs} <= {"in Asia", "in Europe"}


def test_a_stream_ends_where_generate_does(awq):
    """The last partial output of a stream is what generate returns, and the text only grows."""
    (whole,) = awq.generate("The capital of France is", GREEDY, adapter="pirate")
    parts = list(awq.stream("The capital of France is", GREEDY, adapter="pirate"))
    assert parts[-1].text == whole.text
    assert len(parts) > 5
    assert all(len(a.token_ids) < len(b.token_ids) for a, b in zip(parts, parts[1:]))


def test_times_are_in_order(awq):
    """The clock of vLLM's core and ours agree: queued, first token, finished."""
    (output,) = awq.generate("The capital of France is", GREEDY)
    times = output.times
    assert times.queued < times.first_token < times.finished
    assert awq.add_request("my name is", GREEDY).result(timeout=60).times.time_to_first_token > 0


def test_token_ids_are_a_prompt(awq):
    """A prompt of token ids is answered as its text is."""
    (by_text,) = awq.generate("The capital of France is", GREEDY)
    (by_ids,) = awq.generate(list(by_text.prompt_token_ids), GREEDY)
    assert by_ids.token_ids == by_text.token_ids


def test_vllms_own_sampling_params_are_taken(awq):
    """A SamplingParams object works as a mapping does, and is not changed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(temperature=0.0, max_tokens=24)
    (output,) = awq.generate("The capital of France is", params)
    assert output.token_ids == awq.generate("The capital of France is", GREEDY)[0].token_ids
    assert params.output_kind is RequestOutputKind.CUMULATIVE


def test_without_sampling_params_the_models_own_defaults_are_used(awq):
    """sampling_params=None answers, with vLLM's 16 tokens."""
    (output,) = awq.generate("The capital of France is")
    assert 1 <= len(output.token_ids) <= 16


@pytest.mark.parametrize(
    ("params", "error"),
    [({"temperature": -1}, ValueError), ({"max_tokns": 3}, TypeError), ({"n": 0}, ValueError)],
)
def test_wrong_sampling_params_are_refused_at_the_call(awq, params, error):
    """What SamplingParams refuses is an error of the call, with the field's name."""
    with pytest.raises(error, match=next(iter(params))):
        awq.generate("a", params)


def test_a_prompt_that_is_too_long_fails_alone(awq):
    """A prompt over max_model_len is that request's error; a request beside it is answered."""
    from qlora_infer import RequestRejectedError

    good, bad = awq.add_request("my name is", GREEDY), awq.add_request("word " * 600, GREEDY)
    with pytest.raises(RequestRejectedError, match="512"):
        bad.result(timeout=60)
    assert good.result(timeout=60).token_ids


def test_the_fakes_sampling_fields_are_vllms():
    """The fake engine knows the fields that vLLM's SamplingParams has, and no others."""
    from vllm import SamplingParams

    from qlora_infer.testing._engine import _SAMPLING_FIELDS

    assert set(SamplingParams.__struct_fields__) >= _SAMPLING_FIELDS
