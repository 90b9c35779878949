"""For MkDocs: pages link to files of the repository, which are beside ``docs/``; the site has the examples only."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files: Files, config: Any) -> Files:
    """Add the examples to the site; MkDocs calls this once it has listed ``docs/``."""
    for path in sorted(EXAMPLES.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = f"examples/{path.relative_to(EXAMPLES).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to examples into the site, and replace links to other files by their names."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"\]\({re.escape(up)}\.\./examples/", f"]({up}examples/", markdown)
    return re.sub(rf"\[[^]]+\]\({re.escape(up)}\.\./([^)#]+)[^)]*\)", r"`\1`", markdown)
