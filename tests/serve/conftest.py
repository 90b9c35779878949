"""vLLM's configuration of a tiny model, made once: it takes seconds."""

import logging

import pytest


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """A checkpoint without weights, and vLLM's configuration of it for the fake engine."""
    from served import ByteEngine, write_model
    from tokenizers import Tokenizer
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    folder = write_model(tmp_path_factory.mktemp("model") / "bytes")
    ByteEngine.vllm_config = EngineArgs(model=str(folder), max_num_seqs=8).create_engine_config(UsageContext.LLM_CLASS)
    ByteEngine.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    logging.getLogger("vllm").setLevel(logging.WARNING)
    return folder


@pytest.fixture(scope="module")
def one_server(tmp_path_factory, byte_model):
    """The URL of a server that several tests ask, with an adapter named pirate."""
    from served import served

    with served(tmp_path_factory.mktemp("adapters")) as (url, _):
        yield url
