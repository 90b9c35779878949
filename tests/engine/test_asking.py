"""Ways to ask, on the real engine: structured outputs in mixed batches, chats as vLLM writes them, parsed answers."""

import json
import re

import pytest

from qlora_infer import RequestCancelledError

GREEDY = {"temperature": 0.0, "max_tokens": 64}
# No object: between its parts a small model may write spaces without end, and vLLM 0.32's backends take
# ``disable_any_whitespace`` from the engine's configuration only.
SCHEMA = {"enum": ["Italy", "Spain"]}
PROMPT = "The capital of Germany is"
FORMS = {
    "json": {"json": SCHEMA},
    "text": {"json": json.dumps(SCHEMA)},
    "regex": {"regex": "[ab]{3}[0-9]"},
    "choice": {"choice": ["Rome", "Madrid"]},
    "grammar": {"grammar": 'root ::= "left" | "right"'},
}


def fits(form, text):
    if form in ("json", "text"):
        return json.loads(text) in SCHEMA["enum"]
    if form == "regex":
        return re.fullmatch("[ab]{3}[0-9]", text) is not None
    return text in (["Rome", "Madrid"] if form == "choice" else ["left", "right"])


def test_each_answer_of_a_mixed_batch_has_its_own_structure(awq):
    """Base and adapters, each with every kind of structure and without any, in one batch."""
    jobs = [(form, name) for form in (*FORMS, None) for name in (None, *awq.adapters)]
    params = [{**GREEDY, **({"structured_outputs": FORMS[form]} if form else {})} for form, _ in jobs]
    outputs = awq.generate([PROMPT] * len(jobs), params, adapter=[name for _, name in jobs], use_tqdm=False)
    for (form, name), output in zip(jobs, outputs, strict=True):
        assert output.adapter == name
        assert form is None or fits(form, output.text), (form, name, output.text)
    free = dict(zip(jobs, outputs, strict=True))
    alone = awq.generate([PROMPT] * len(awq.adapters), GREEDY, adapter=list(awq.adapters), use_tqdm=False)
    for name, output in zip(awq.adapters, alone, strict=True):
        assert free[None, name].text[:8] == output.text[:8]  # who asked for nothing is not bound


def test_an_impossible_structure_fails_one_row(awq):
    """The row has the error, the others are answered, and so is the next call."""
    params = [GREEDY, {"structured_outputs": {"json": {"type": "nothing"}}}, {"structured_outputs": {"regex": "(("}}]
    outputs = list(awq.generate_iter([PROMPT] * 3, params, on_error="return", use_tqdm=False))
    assert [type(output.error) for output in outputs] == [type(None), ValueError, ValueError]
    with pytest.raises(ValueError, match="structured_outputs"):
        awq.generate([PROMPT] * 3, params, use_tqdm=False)
    assert awq.stats().num_waiting == awq.stats().num_running == 0
    assert awq.generate(PROMPT, GREEDY, use_tqdm=False)[0].text


def test_cancelled_structures_leave_nothing_behind(awq):
    """Half of the requests are cancelled while they run; the others keep their structure."""
    params = {**GREEDY, "max_tokens": 60, "structured_outputs": {"regex": "[ab]{40}"}}
    names = [None, *awq.adapters] * 4
    handles = [awq.add_request(PROMPT, params, adapter=name) for name in names]
    next(iter(handles[0]))
    for handle in handles[1::2]:
        handle.cancel()
    for number, handle in enumerate(handles):
        if number % 2:
            with pytest.raises(RequestCancelledError):
                handle.result()
        else:
            assert re.fullmatch("[ab]{40}", handle.result().text)


def test_chats_go_on_and_leave_out(awq):
    """A continued message ends the prompt, which has the same tokens as its text given to generate."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where is Rome?"}]}]
    begun = [*messages, {"role": "assistant", "content": "Rome is the capital of"}]
    (output,) = awq.chat(begun, GREEDY, continue_final_message=True, use_tqdm=False)
    assert output.prompt.endswith("assistant\nRome is the capital of")
    (same,) = awq.generate(output.prompt, GREEDY, add_special_tokens=False, use_tqdm=False)
    assert same.prompt_token_ids == output.prompt_token_ids
    assert same.token_ids[0] == output.token_ids[0]
    handle = awq.add_request({"messages": messages, "add_generation_prompt": False}, GREEDY, adapter="pirate")
    assert handle.result().prompt.endswith("Where is Rome?<|im_end|>\n")


def test_log_probabilities_are_plain_floats(awq):
    """What a trainer stores is numbers, and JSON takes an output as it is."""
    (output,) = awq.generate(PROMPT, {**GREEDY, "logprobs": 0}, adapter="pirate", use_tqdm=False)
    (completion,) = output.outputs
    assert {type(each) for each in completion.token_logprobs} == {float}
    plain = json.loads(json.dumps(output.to_dict()))
    assert plain["num_prompt_tokens"] == output.num_prompt_tokens == len(output.prompt_token_ids)
    assert plain["completions"][0]["token_logprobs"] == list(completion.token_logprobs)
    assert plain["adapter_version"] >= 1


def test_an_image_to_a_model_without_eyes_is_an_error(awq):
    """The message says that the model reads text only; the engine goes on."""
    from PIL import Image

    picture = Image.new("RGB", (8, 8))
    messages = [{"role": "user", "content": [{"type": "image_pil", "image_pil": picture}]}]
    with pytest.raises(ValueError, match="text only"):
        awq.chat(messages, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="text only"):
        awq.generate({"prompt": "x", "multi_modal_data": {"image": picture}}, GREEDY, use_tqdm=False)
    assert awq.generate(PROMPT, GREEDY, use_tqdm=False)[0].text
