"""The rules of the house: which module may import which, and what exists only once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "image_classification.py"
TOOLS = ["inference", "explain", "export", "app", "tune", "compare"]
PACKAGE = sorted((REPOSITORY / "classifier").rglob("*.py"))
SOURCES = [SCRIPT, *PACKAGE, *(REPOSITORY / f"{name}.py" for name in TOOLS)]
# `inference.py` runs an ONNX file where torch is not installed
WITHOUT_TORCH = [
    "classifier",
    "classifier.config",
    "classifier.recipes",
    "classifier.cli",
    "classifier.errors",
    "classifier.evaluation",
    "classifier.files",
    "classifier.foreign_paths",
    "classifier.image_input",
    "classifier.metrics",
    "classifier.plots",
    "classifier.prediction_output",
    "classifier.progress",
    "classifier.rejection",
    "classifier.result_output",
    "classifier.text",
    "classifier.legacy",
    "classifier.datasets",
    "classifier.datasets.decode",
    "classifier.datasets.fitting",
    "classifier.datasets.identity",
    "classifier.datasets.image_metadata",
    "classifier.datasets.image_records",
    "classifier.datasets.pixel_range",
    "classifier.datasets.unreadable",
    "classifier.datasets.walk",
    "classifier.networks",
]
SLOW = {
    "sklearn",
    "scipy",
    "matplotlib",
    "tensorboard",
    "kornia",
    "captum",
    "pandas",
    "torchvision",
    "timm",
    "safetensors",
}


def module_name(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module_name(path): tree_of(path) for path in SOURCES}


def imported(tree, known=MODULES):
    """The modules of this project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def test_arrows_go_down():
    for name, tree in MODULES.items():
        above = imported(tree)
        if name.startswith("classifier"):
            assert all(other.startswith("classifier") for other in above), (name, above)
        if name == "image_classification":
            assert not above & set(TOOLS), above


def test_there_are_no_circles():
    arrows = {name: imported(tree) - {name} for name, tree in MODULES.items()}
    # importing a submodule runs its package's __init__, which imports nothing
    finished = set()
    while len(finished) < len(arrows):
        free = {name for name in arrows.keys() - finished if arrows[name] <= finished}
        assert free, f"a circle among {sorted(arrows.keys() - finished)}"
        finished |= free


def test_nothing_is_imported_by_string():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            assert function not in ("importlib.import_module", "import_module", "__import__"), name
            if function.endswith("spec_from_file_location"):  # a user's FILE.py:FACTORY
                assert name == "classifier.networks.custom"


def test_one_reader_of_model_files_and_one_atomic_writer():
    for name, tree in MODULES.items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if "torch.load" in calls:
            assert name == "classifier.checkpoints"
        if "os.replace" in calls or "os.fsync" in calls:
            assert name in ("classifier.files", "classifier.datasets.image_cache"), name


def test_slow_packages_are_imported_where_they_are_used():
    for name, tree in MODULES.items():
        if name in TOOLS:
            continue
        for node in tree.body:
            if isinstance(node, ast.Import):
                roots = {alias.name.partition(".")[0] for alias in node.names}
                assert not roots & SLOW, (name, roots)
            if isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] not in SLOW, (name, node.module)


def test_modules_that_need_no_torch_import_none():
    lines = [f"import {name}" for name in WITHOUT_TORCH]
    code = "\n".join(["import sys", *lines, "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_modules_have_one_purpose(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 420, f"{lines} lines"


def test_torch_distributed_is_asked_in_one_place():
    for name, tree in MODULES.items():
        if name in ("classifier.distributed", "classifier.rendezvous"):  # which only that one uses
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not ast.unparse(node).startswith(("torch.distributed", "dist.")), name
