"""The notebook, executed from top to bottom."""

import json

import nbclient
import nbformat
from conftest import REPOSITORY, find_cifar10

NOTEBOOK = REPOSITORY / "image_classification.ipynb"


def test_notebook_runs_from_top_to_bottom(folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    place = find_cifar10()
    data = {"dataset": "cifar10", "data_dir": str(place), "subset": 2000} if place else {"dataset": "digits"}
    cell.source = f"settings = {data | {'epochs': 2, 'width': 0.25}!r}\nkeep_on_drive = False"
    for name in ("image_classification.py", "inference.py", "explain.py", "alternatives"):
        (folder / name).symlink_to(REPOSITORY / name)
    nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Test accuracy" in printed and "Epoch 0001" in printed and "Total params" in printed


def test_notebook_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
