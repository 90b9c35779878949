"""For mkdocstrings: "Example:" in our docstrings is the section that griffe knows as "Examples:"."""

from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section, so that its ``>>>`` are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in an object's docstring; griffe calls this for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
