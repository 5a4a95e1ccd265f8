"""The notebook, executed from top to bottom."""

import io
import subprocess
import sys
import zipfile

import nbclient
import nbformat
from conftest import REPOSITORY, find_cifar10
from mirror import Mirror

NOTEBOOK = REPOSITORY / "image_classification.ipynb"


def test_notebook_runs_from_top_to_bottom(folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    place = find_cifar10()
    data = {"dataset": "cifar10", "data_dir": str(place), "subset": 2000} if place else {"dataset": "digits"}
    cell.source = f"settings = {data | {'epochs': 2, 'width': 0.25}!r}\nkeep_on_drive = False"
    for name in ("image_classification.py", "inference.py", "explain.py", "alternatives"):
        (folder / name).symlink_to(REPOSITORY / name)
    where = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Test accuracy" in printed and "Epoch 0001" in printed and "Total params" in printed


def test_first_cell_fetches_the_project_where_it_is_opened_alone(folder, monkeypatch):
    """As in Colab: from a ZIP as GitHub serves it, with everything in one folder."""
    names = ["image_classification.py", "inference.py", "explain.py", "requirements.txt", "README.md"]
    names += [f"alternatives/{path.name}" for path in (REPOSITORY / "alternatives").glob("*.py")]
    with zipfile.ZipFile(served := io.BytesIO(), "w") as archive:
        for name in names:
            archive.write(REPOSITORY / name, f"project-main/{name}")
        archive.writestr("project-main/../outside.py", "")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = next(cell.source for cell in cells if cell.cell_type == "code")
    assert 'ADDRESS = ""' in code
    (folder / "alone").mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def first_cell(address):
        here = code.replace('ADDRESS = ""', f"ADDRESS = {address!r}")
        return subprocess.run([sys.executable, "-c", here], cwd=folder / "alone", capture_output=True, text=True)

    assert "open this notebook in the folder of" in first_cell("").stderr
    with Mirror(served.getvalue()) as server:
        done = first_cell(f"{server.url}/good/main.zip")
    assert done.returncode == 0, done.stderr
    arrived = {path.relative_to(folder / "alone").as_posix() for path in (folder / "alone").rglob("*.*")}
    assert {name for name in names if name != "README.md"} == arrived
    assert not list(folder.rglob("outside.py"))


def test_notebook_is_stored_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
