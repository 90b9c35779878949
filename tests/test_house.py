"""Where things live: which folder may import which, where other libraries are imported, and how large a folder may be."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import qlora_infer

HOUSE = Path(qlora_infer.__file__).parent
MODULES = {".".join(path.relative_to(HOUSE).with_suffix("").parts): path for path in HOUSE.rglob("*.py")}

#: From top to bottom: whoever stands in a line may import from lines below it, and from its own folder.
FLOORS = [
    "__main__",
    "cli ray",
    "serve",
    "__init__",
    "metrics testing",
    "engine",
    "_vllm",
    "requests",
    "adapters",
    "basewise",
    "model",
    "sources plan",
    "conversions",
    "files",
    "quantization chat demo",
    "sandbox",
    "config display durations heap http_status tracing _forked _packages",
    "errors",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}

#: Each of these libraries is imported in one place only.
DOORS = {"vllm": "_vllm", "huggingface_hub": "sources.repository", "fsspec": "sources.filesystem"}

#: Files of a folder, but for its ``__init__.py``.
LARGEST_FOLDER = 12


def room(module):
    return module.split(".")[0]


@cache
def imports(module):
    """The modules that one imports anywhere in it, but for those that only its annotations need."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in for_types:
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node not in for_types:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(module):
    """Those of our modules among them, without the package's name; what is no module of ours is an attribute of one."""
    for name in imports(module):
        if name.startswith("qlora_infer."):
            name = name.removeprefix("qlora_infer.")
            while name not in MODULES and f"{name}.__init__" not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            is_module = name in MODULES or f"{name}.__init__" in MODULES
            yield name if is_module else "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_below(module):
    """Nothing imports from a floor above its own, or from beside it; within a folder, anything may."""
    allowed = {name for name in own_imports(module) if room(name) == room(module)}
    assert {name for name in own_imports(module) if FLOOR[room(name)] <= FLOOR[room(module)]} <= allowed


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_a_library_has_one_door(library, door):
    """vLLM's parts are met in ``_vllm/`` alone, and each library that downloads in one file."""
    users = {module for module in MODULES if any(room(name) == library for name in imports(module))}
    assert users
    assert {module for module in users if module != door and not module.startswith(f"{door}.")} == set()


def test_folders_are_small():
    """A folder can be read at a glance."""
    sizes = Counter(
        path.parent.relative_to(HOUSE).as_posix() for path in MODULES.values() if path.name != "__init__.py"
    )
    assert {folder: size for folder, size in sizes.items() if size > LARGEST_FOLDER} == {}
