"""The plan as a whole: what vLLM gets, what is printed and logged, and what an engine shows of it."""

import copy
import logging

import pytest
from machines import AWQ, LLAMA_8B, cpu, gpu, plan_of, reason

from qlora_infer import QuantizationError
from qlora_infer.plan.engine_plan import KERNELS_KEY
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

MODEL = {**AWQ, **LLAMA_8B, "vocab_size": 128_256}


class GPU(FakeEngine):
    """A Llama of 8 billion parameters in 4 bits, on a GPU of so many GiB."""

    def __init__(self, gib):
        super().__init__(model_config=MODEL)
        self._gib = gib

    def platform(self):
        return gpu(self._gib)


def test_a_plan_is_a_pure_function():
    """The same config, checkpoint and machine give the same plan, and none of them is changed."""
    model, platform = copy.deepcopy(MODEL), gpu()
    options = {"max_loras": "auto", "engine_args": {"max_num_seqs": 32, "additional_config": {"a": 1}}}
    plans = [plan_of(platform, model, lora_kernels="vllm", **options) for _ in range(2)]
    assert plans[0] == plans[1]
    assert model == MODEL
    assert platform == gpu()
    assert options["engine_args"] == {"max_num_seqs": 32, "additional_config": {"a": 1}}


def test_vllm_gets_every_argument():
    """engine_args go to vLLM as they are, beside the strategy's and this library's."""
    theirs = {"seed": 7, "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    engine_args = plan_of(gpu(), token="hf_secret", revision="v1", max_lora_rank=32, engine_args=theirs).engine_args
    own = {"model": "org/model", "revision": "v1", "hf_token": "hf_secret", "max_model_len": None, "enable_lora": True}
    assert {**theirs, **own, "quantization": "awq", "max_lora_rank": 32}.items() <= engine_args.items()


def test_engine_args_may_not_contradict_the_strategy():
    """A key that the strategy sets to another value is refused; the same value is not."""

    class InFloat16:
        name = "in float16"

        def matches(self, model_config):
            return True

        def check(self, config, model_config, platform):
            pass

        def engine_args(self, config, model_config):
            return {"dtype": "float16"}

    with pytest.raises(ValueError, match="dtype"):
        plan_of(gpu(), quantization=InFloat16(), engine_args={"dtype": "bfloat16"})
    plan = plan_of(gpu(), quantization=InFloat16(), engine_args={"dtype": "float16"})
    assert plan.engine_args["dtype"] == "float16"


@pytest.mark.parametrize(
    ("checkpoint", "asked", "chosen", "why"),
    [
        (AWQ, "auto", "awq", "the checkpoint names 'awq'"),
        (AWQ, None, "awq", "the checkpoint names 'awq'"),
        ({}, "auto", "bitsandbytes", "in flight"),
        ({}, None, "none", "the checkpoint is not quantized, and stays so"),
        ({}, "none", "none", "given"),
    ],
)
def test_the_quantization_has_a_reason(checkpoint, asked, chosen, why):
    """ "auto" and None take what the checkpoint names; of an unquantized one, None is as in vLLM: it stays in 16 bits."""
    packages = frozenset({"vllm", "bitsandbytes", "vllm-bnb-plugin"})
    plan = plan_of(gpu(packages=packages), checkpoint, quantization=asked)
    assert plan.quantization == chosen
    assert why in reason(plan, "quantization")


def test_what_a_strategy_refuses_has_no_plan():
    """The strategy's own error, before anything is decided."""
    with pytest.raises(QuantizationError, match=r"7\.5 or newer"):
        plan_of(gpu(capability=70))


def test_whose_kernels_compute_has_a_reason():
    """This library's on CPUs and on Hopper; "vllm" reaches the workers, beside the user's own additional_config."""
    for platform, whose in ((cpu(), "qlora_infer"), (gpu(), "qlora_infer"), (gpu(capability=80), "vllm")):
        (kernels,) = (made for made in plan_of(platform).decisions if made.name == "lora_kernels")
        assert kernels.value == whose
        assert "additional_config" not in plan_of(platform).engine_args
    plan = plan_of(gpu(), lora_kernels="vllm", engine_args={"additional_config": {"a": 1}})
    assert plan.engine_args["additional_config"] == {"a": 1, KERNELS_KEY: "vllm"}


def test_vllms_kernels_are_refused_where_they_answer_wrongly():
    """On a CPU they give base requests another request's adapter."""
    with pytest.raises(ValueError, match='leave it "auto"'):
        plan_of(cpu(), lora_kernels="vllm")


def test_a_plan_is_printed_with_its_reasons_and_without_secrets():
    """Each decision in a line; of engine_args the names only, and the token nowhere."""
    given = {"max_num_seqs": 32, "model_loader_extra_config": {"secret": "s3_secret"}}
    plan = plan_of(gpu(), MODEL, max_loras="auto", max_cpu_loras=16, token="hf_secret", engine_args=given)
    lines = {line.split()[0]: line for line in str(plan).splitlines() if line}
    assert lines["model"].split()[1:] == ["org/model"]
    assert lines["max_loras"].split(maxsplit=2)[1:] == ["12", "slots of 320 MiB, for which there are 4.0 GiB"]
    assert lines["max_cpu_loras"].split()[1:] == ["16", "given"]
    assert lines["max_lora_rank"].split()[1] == "64"
    assert "CUDA graphs without torch.compile" in lines["startup"]
    assert lines["VLLM_USE_BREAKABLE_CUDAGRAPH"].split()[1] == "1"
    assert "max_num_seqs, model_loader_extra_config" in lines["engine_args"]
    for text in (str(plan), repr(plan), plan._repr_html_()):
        assert "_secret" not in text


@pytest.mark.parametrize(("gib", "arguments", "is_eager"), [(80, {}, False), (8, {"max_loras": 1}, True)])
def test_an_engine_starts_by_its_plan_and_logs_the_reasons(gib, arguments, is_eager, caplog):
    """The backend gets the plan that engine.plan shows; the log has what was chosen, a costly choice as a warning."""
    backend = GPU(gib)
    with (
        caplog.at_level(logging.INFO, "qlora_infer"),
        fake_engine(backend=backend, max_lora_rank=16, **arguments) as engine,
    ):
        assert backend.engine_args is engine.plan.engine_args
        assert backend.engine_args["enforce_eager"] is is_eager
        with pytest.raises(AttributeError):
            engine.plan = None
    logged = {(record.levelname, record.getMessage().partition(": ")[0]) for record in caplog.records}
    assert ("INFO", "quantization='awq'") in logged
    assert ("INFO", f"max_cpu_loras={engine.plan.max_cpu_loras}") in logged
    assert (("WARNING", "enforce_eager=True") in logged) is is_eager
    assert (("INFO", "startup='fast'") in logged) is not is_eager


@pytest.mark.parametrize(("ranks", "rank"), [((), 64), ((8,), 16), ((64, 4), 64)])
def test_the_rank_is_that_of_the_first_adapters(ranks, rank, tmp_path):
    """max_lora_rank="auto" takes what `adapters` need, or 64 without any; the plan has the reason."""
    adapters = {f"a{number}": write_adapter(tmp_path / str(number), rank=number) for number in ranks}
    with fake_engine(adapters=adapters) as engine:
        assert engine.plan.engine_args["max_lora_rank"] == rank
        assert ("adapters that load at the start need it" in reason(engine.plan, "max_lora_rank")) is bool(ranks)
