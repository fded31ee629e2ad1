"""The notebook in examples/ runs from its first cell to its last, and shows what it promises."""

import nbformat
from helpers.paths import EXAMPLE
from nbclient import NotebookClient

NOTEBOOK = EXAMPLE / "notebook.ipynb"


def test_the_notebook(tmp_path):
    (tmp_path / "model").symlink_to(EXAMPLE / "model")
    (tmp_path / "data").symlink_to(EXAMPLE / "data")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept clean in the repository
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [
        "".join(output.get("data", {}).get("text/html", "")) + output.get("text", "")
        + "".join(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    ]  # fmt: skip
    html = [text for text in shown if '<table class="heat">' in text]
    assert len(html) == 2
    assert "<polyline" in html[1]
    assert any(text.startswith("train: ") for text in shown)
    assert any("verified " in text for text in shown)
    assert (tmp_path / "notebook-gguf/model.gguf").exists()
    assert any("llama-cli -m notebook-gguf/model.gguf" in text for text in shown)
