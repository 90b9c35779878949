"""VeRA adapters, which are LoRA once the model tells the inputs of their modules."""

import json

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from basewise.tiny_bases import save  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qlora_infer.basewise import vera  # noqa: E402
from qlora_infer.errors import AdapterError, CorruptAdapterError, IncompatibleAdapterError  # noqa: E402
from qlora_infer.files.safetensors import map_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

VERA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "d_initial": 0.5}


@pytest.mark.parametrize("projections", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 1234567}], ids=str
)
def test_vera_is_a_lora_of_the_same_rank(options, projections, tiny_bases, tmp_path):
    """Modules of several sizes, with the projections in the file, or drawn again as PEFT draws them."""
    base = tiny_bases["llama"]
    config = peft.VeraConfig(**{**VERA, **options}, save_projection=projections)
    adapter = save(base, config, tmp_path / "a")
    theirs, ours = base.logits(adapter), base.logits(base.served(adapter, tmp_path / "store"))
    assert (theirs - ours).abs().max() < 2e-4
    assert (theirs - base.logits(None)).abs().median() > 0.01


def test_the_projections_are_drawn_as_peft_draws_them(tiny_bases):
    """Bit for bit, which another version of torch or of PEFT may change."""
    model = peft.get_peft_model(tiny_bases["llama"].network(), peft.VeraConfig(**VERA, projection_prng_key=77))
    a, b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    ours = vera.draw(16, a.shape[1], b.shape[0], 77)
    assert np.array_equal(ours[0], a.numpy())
    assert np.array_equal(ours[1], b.numpy())


def test_the_factors_are_the_vectors_times_the_projections(tiny_bases, tmp_path):
    """A holds lambda_d, B holds lambda_b: in float32, as PEFT multiplies them when it merges."""
    base = tiny_bases["llama"]
    config = peft.VeraConfig(**{**VERA, "target_modules": ["o_proj"]})
    adapter = save(base, config, tmp_path / "a")
    model = peft.PeftModel.from_pretrained(base.network(), adapter)
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    served = map_tensors("a", base.served(adapter, tmp_path / "store") / "adapter_model.safetensors")
    a, b = (served[f"base_model.model.model.layers.1.self_attn.o_proj.lora_{factor}.weight"] for factor in "AB")
    assert torch.equal(torch.from_numpy(b @ a), layer.get_delta_weight("default").detach())


def test_an_untrained_adapter_is_known_to_change_nothing(tiny_bases, tmp_path):
    """lambda_b begins as zeros."""
    model = peft.get_peft_model(tiny_bases["llama"].network(), peft.VeraConfig(**VERA))
    model.save_pretrained(tmp_path / "a")
    manifest, fit = tiny_bases["llama"].held_against(tmp_path / "a", tmp_path / "store")
    assert fit.placement.sources == manifest.zero_modules


def test_a_rank_above_the_engines_is_refused(tiny_bases, tmp_path):
    """VeRA's default rank is 256."""
    adapter = save(tiny_bases["llama"], peft.VeraConfig(**{**VERA, "r": 256}), tmp_path / "a")
    with pytest.raises(IncompatibleAdapterError, match="max_lora_rank=256"):
        tiny_bases["llama"].held_against(adapter, tmp_path / "1")
    assert tiny_bases["llama"].held_against(adapter, tmp_path / "2", max_lora_rank=256)


def test_projections_that_cannot_be_drawn_are_refused(tiny_bases, tmp_path):
    """They depend on the largest module, which may be one that the model does not have."""
    adapter = save(tiny_bases["llama"], peft.VeraConfig(**VERA, save_projection=False), tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.1.mlp", "tower.1.mlp"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(IncompatibleAdapterError, match="save_projection=True"):
        tiny_bases["llama"].held_against(adapter, tmp_path / "store")


@pytest.fixture(scope="module")
def sound(tiny_bases, tmp_path_factory):
    """An adapter whose file and config are changed."""
    config = peft.VeraConfig(**{**VERA, "target_modules": ["q_proj"]})
    return save(tiny_bases["llama"], config, tmp_path_factory.mktemp("sound") / "a")


SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**70), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(st.integers(0, 5), SHAPES, max_size=2),
    dropped=st.sets(st.integers(0, 5), max_size=2),
    config=st.dictionaries(
        st.sampled_from(["r", "projection_prng_key", "save_projection", "peft_type", "bias"]), VALUES, max_size=2
    ),
)
def test_whatever_a_file_holds_is_read_or_refused(shapes, dropped, config, sound, tiny_bases, tmp_path_factory):
    """An adapter of any shapes and fields ends in an error that is typed, or is written for vLLM."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a").mkdir()
    tensors = load_file(sound / "adapter_model.safetensors")
    for number, name in enumerate(sorted(tensors)):
        if number in shapes:
            tensors[name] = torch.ones(shapes[number])
        if number in dropped:
            del tensors[name]
    save_file(tensors, folder / "a" / "adapter_model.safetensors")
    fields = json.loads((sound / "adapter_config.json").read_text())
    (folder / "a" / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    try:
        manifest, fit = tiny_bases["llama"].held_against(folder / "a", folder / "store")
    except AdapterError:
        return
    served = write(manifest, fit)
    assert set(map_tensors("x", served / "adapter_model.safetensors"))


def write(manifest, fit):
    from qlora_infer.adapters.served import write_served

    return write_served("x", manifest.folder, fit.placement, fit.conversion)


def test_a_missing_vector_is_named(sound, tiny_bases, tmp_path):
    """And so is a projection that the config promises."""
    for dropped, words in ((".vera_lambda_d", "vera_lambda_d"), ("vera_B", "projections")):
        folder = tmp_path / words
        folder.mkdir()
        tensors = load_file(sound / "adapter_model.safetensors")
        save_file({n: t for n, t in tensors.items() if not n.endswith(dropped)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text((sound / "adapter_config.json").read_text())
        with pytest.raises(CorruptAdapterError, match=words):
            tiny_bases["llama"].held_against(folder, tmp_path / f"{words}-store")
