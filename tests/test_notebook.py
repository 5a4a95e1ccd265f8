"""The notebook, executed from top to bottom."""

import ast
import io
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY, find_cifar10
from mirror import Mirror

NOTEBOOK = REPOSITORY / "image_classification.ipynb"
SCRIPTS = ["image_classification.py", "inference.py", "explain.py"]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(notebook, folder):
    settings = {"dataset": "digits", "epochs": 2, "width": 0.25}
    place = find_cifar10()
    if place:
        settings.update({"dataset": "cifar10", "data_dir": str(place), "subset": 2000})
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = f"settings = {settings!r}\nkeep_on_drive = False"
    for name in (*SCRIPTS, "classifier"):
        (folder / name).symlink_to(REPOSITORY / name)
    resources = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources=resources
    )
    client.execute()

    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Test accuracy" in printed and "Epoch 0001" in printed and "Total params" in printed


def test_first_cell_gets_the_project_if_only_the_notebook_was_opened(notebook, folder, monkeypatch):
    """As in Colab: from a ZIP file as GitHub serves it, with everything in one folder."""
    names = [*SCRIPTS, "requirements.txt"]
    for path in (REPOSITORY / "classifier").rglob("*.py"):
        names.append(path.relative_to(REPOSITORY).as_posix())
    served = io.BytesIO()
    with zipfile.ZipFile(served, "w") as archive:
        for name in [*names, "README.md"]:
            archive.write(REPOSITORY / name, f"project-main/{name}")
        archive.writestr("project-main/../outside.py", "")
    code = code_cells(notebook)[0].source
    assert 'ADDRESS = ""' in code
    alone = folder / "alone"
    alone.mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run_first_cell(address):
        with_address = code.replace('ADDRESS = ""', f"ADDRESS = {address!r}")
        command = [sys.executable, "-c", with_address]
        return subprocess.run(command, cwd=alone, capture_output=True, text=True)

    assert "FileNotFoundError" in run_first_cell("").stderr
    with Mirror(served.getvalue()) as server:
        done = run_first_cell(f"{server.url}/good/main.zip")
    assert done.returncode == 0, done.stderr
    arrived = [path.relative_to(alone).as_posix() for path in alone.rglob("*.*")]
    assert sorted(arrived) == sorted(names)
    assert not list(folder.rglob("outside.py"))


def test_notebook_uses_only_names_that_exist(notebook):
    """Quicker than to execute it: what its cells import, and take from the script and the tools."""
    import explain
    import image_classification
    import inference

    modules = {"ic": image_classification, "inference": inference, "explain": explain}
    used = []
    for cell in code_cells(notebook):
        source = cell.source.removeprefix("%matplotlib inline\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules:
                used.append(node.attr)
                assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)
            if isinstance(node, ast.ImportFrom) and node.module.startswith("classifier."):
                used.append(node.module)
                exec(ast.unparse(node), {})
    assert len(used) > 10


def test_notebook_is_stored_without_outputs(notebook):
    for cell in code_cells(notebook):
        assert not cell.outputs and not cell.execution_count
