"""Programs find what lies beside them, and nothing else of the same name."""

import os
import subprocess
import sys

import pytest
from conftest import QUICK, REPOSITORY, SCRIPT

PROGRAMS = ["image_classification", "inference", "compare", "explain", "export", "tune", "app"]


@pytest.fixture
def foreign(folder):
    """A current folder with another package of the name, which is also where packages are."""
    for place in (folder, folder / "packages"):
        (place / "classifier").mkdir(parents=True)
        (place / "classifier" / "__init__.py").write_text("raise SystemError('the wrong one')")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment"),
    [*((name, {"PYTHONSAFEPATH": "1"}) for name in PROGRAMS), (PROGRAMS[0], {})],
)
def test_programs_find_the_package_beside_them(foreign, name, environment):
    """Python leaves the folder of the script out of sys.path if it is asked to."""
    command = [sys.executable, str(REPOSITORY / f"{name}.py"), "--help"]
    variables = {**os.environ, "PYTHONPATH": str(foreign / "packages"), **environment}
    done = subprocess.run(command, cwd=foreign, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout.partition("\n")[0]


@pytest.mark.slow
def test_run_with_a_safe_path(foreign):
    command = [sys.executable, str(SCRIPT), *QUICK, "--epochs", "1"]
    variables = {**os.environ, "PYTHONPATH": str(foreign / "packages"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=foreign, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = next(iter((REPOSITORY / "docs").glob("*.png")))
    command = [sys.executable, str(REPOSITORY / "inference.py"), str(image)]
    done = subprocess.run(command, cwd=foreign, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and image.name in done.stdout, done.stderr


def test_importing_a_program_leaves_the_search_path_alone():
    code = "import sys; before = list(sys.path); import inference; assert sys.path == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
