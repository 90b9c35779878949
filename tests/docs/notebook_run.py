"""How ``examples/adapters.ipynb`` is executed: by a real kernel, as Jupyter does."""

import nbformat
from attrs import frozen
from doc_blocks import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "adapters.ipynb"


@frozen
class Shown:
    """What the cells of a notebook show: cell id -> its outputs."""

    outputs: dict

    def printed(self, cell):
        """What a cell prints."""
        return "".join(output.text for output in self.outputs[cell] if output.get("name") == "stdout")

    def on_stderr(self, cell):
        """What a cell writes there: bars of progress."""
        return "".join(output.text for output in self.outputs[cell] if output.get("name") == "stderr")

    def text(self, cell):
        """What a cell displays last, as text."""
        return self._bundles(cell)[-1]["text/plain"]

    def html(self, cell):
        """The same as HTML."""
        return self._bundles(cell)[-1]["text/html"]

    def has_picture(self, cell):
        """Whether a cell displays a picture."""
        return any("image/png" in bundle for bundle in self._bundles(cell))

    def _bundles(self, cell):
        return [output.data for output in self.outputs[cell] if "data" in output]


def read_notebook():
    """The notebook, checked against its format."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run_notebook(folder, *, first_cell="", at_the_end=None, timeout=300):
    """Execute the notebook in a folder; an error in a cell is one here.

    Args:
        folder: Where its kernel runs.
        first_cell: A cell of the test's own, before all others.
        at_the_end: Such cells by their ids, before the one that closes the engine.
        timeout: Seconds for each cell.
    """
    notebook = read_notebook()
    more = [nbformat.v4.new_code_cell(source, id=cell) for cell, source in (at_the_end or {}).items()]
    notebook.cells[-1:-1] = more
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first_cell, id="of-the-test"))
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    return Shown({cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"})
