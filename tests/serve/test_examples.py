"""The files for operators under examples/serve: each option, key, port and path in them is one that exists."""

import configparser
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from qlora_infer.cli.app import app
from qlora_infer.cli.serve import ADMIN_KEY, API_KEY

FOLDER = Path(__file__).parents[2] / "examples" / "serve"


def check_command(words):
    """Parse the arguments of ``serve`` as the program does."""
    command = typer.main.get_command(app).commands["serve"]
    with command.make_context("serve", list(words)) as context:
        assert context.params["model"] == "org/model-AWQ"


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """A folder in the place of /srv/adapters."""
    (tmp_path / "adapters").mkdir()
    return str(tmp_path / "adapters")


def test_the_unit_s_command_is_right(adapters):
    """systemd would start the program with options that it has, and waits longer than it drains."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(FOLDER / "qlora-infer.service")
    program, command, *words = shlex.split(unit["Service"]["ExecStart"].replace("/srv/adapters", adapters))
    assert (Path(program).name, command) == ("qlora-infer", "serve")
    check_command(words)
    drain = float(words[words.index("--drain") + 1])
    assert int(unit["Service"]["TimeoutStopSec"]) > drain + 30


def test_the_containers_fit_each_other(adapters):
    """The image's entry point takes what Compose passes; keys, port, probe and files are those that exist."""
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    server = compose["services"]["server"]
    image = (FOLDER / "Dockerfile").read_text()
    program, command, *words = re.findall(r'"([^"]+)"', re.search(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)[1])
    assert (program, command) == ("qlora-infer", "serve")
    check_command([*words, *(word.replace("/srv/adapters", adapters) for word in server["command"])])
    assert {API_KEY, ADMIN_KEY} <= set(server["environment"])
    assert "127.0.0.1:8000/health/ready" in image
    (scraped,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == ["server:8000"]
    mounted = [volume for service in compose["services"].values() for volume in service.get("volumes", ())]
    files = [volume.split(":")[0] for volume in mounted if volume.startswith("..") or ".yaml" in volume]
    assert [file for file in files if not (FOLDER / file).resolve().is_file()] == []
