"""Runs examples/adapters.ipynb and writes the page that shows it with its outputs: ``nox -s notebook``."""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter

EXAMPLES = Path(__file__).parents[1] / "examples"

os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # which the page leaves out
notebook = nbformat.read(EXAMPLES / "adapters.ipynb", as_version=4)
NotebookClient(notebook, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
for cell in notebook.cells:
    if cell.cell_type == "code":
        # Standard error has progress bars, and vLLM's log of this machine.
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]

files = {"unique_key": "adapters", "output_files_dir": "adapters_files"}
page, resources = MarkdownExporter().from_notebook_node(notebook, resources=files)
page = re.sub(r"(?<=[>\s])/[\w./-]*/", "…/", page)  # where the model and the adapters are on this machine
FilesWriter(build_directory=str(EXAMPLES)).write(page, resources, notebook_name="adapters")
