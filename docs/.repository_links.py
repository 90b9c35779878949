"""For MkDocs: pages link to files of the repository, which are beside ``docs/``; the site has the examples only."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files: Files, config: Any) -> Files:
    """Add the examples to the site; MkDocs calls this once it has listed ``docs/``."""
    for path in sorted(EXAMPLES.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = f"examples/{path.relative_to(EXAMPLES).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
            if path.suffix == ".py":
                files.append(_script_page(config, name, path.read_text(encoding="utf-8")))
    return files


def _script_page(config: Any, name: str, code: str) -> File:
    """Return a page that shows a script, because browsers download the file itself."""
    file_name = name.rpartition("/")[2]
    text = f"# {file_name}\n\n[Download]({file_name})\n\n```python\n{code}```\n"
    return File.generated(config, f"{name.removesuffix('.py')}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to examples into the site, to a script's page, and replace links to other files by their names."""
    up = "../" * page.file.src_uri.count("/")
    examples = rf"\]\({re.escape(up)}\.\./examples/"
    markdown = re.sub(rf"({examples}[\w/]+)\.py\)", r"\1.md)", markdown)
    markdown = re.sub(examples, f"]({up}examples/", markdown)
    return re.sub(rf"\[[^]]+\]\({re.escape(up)}\.\./([^)#]+)[^)]*\)", r"`\1`", markdown)
