"""Programs find what lies beside them, and nothing else of the same name."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SCRIPT

PROGRAMS = ["image_classification", "inference", "compare", "explain", "export", "tune", "app"]


@pytest.fixture
def foreign(folder):
    """A current folder with another package of the name, which is also where packages are."""
    for place in (folder, folder / "packages"):
        (place / "classifier").mkdir(parents=True)
        (place / "classifier" / "__init__.py").write_text("raise SystemError('the wrong one')")
    return folder


# Runs each program with --help, as Python started with its name would: with that search path, and
# without this project's modules. What they need of others is imported once.
HELP = """
import contextlib, io, runpy, sys

search_path = list(sys.path)
for program in sys.argv[1:]:
    own = [name for name in sys.modules if name.partition(".")[0] in ("classifier", *{names})]
    for name in own:
        del sys.modules[name]
    sys.path[:] = search_path
    sys.argv = [program, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(program, run_name="__main__")
    print(printed.getvalue().partition("\\n")[0])
"""


@pytest.mark.slow
def test_programs_find_the_package_beside_them(foreign):
    """Python leaves the folder of the script out of sys.path if it is asked to."""
    programs = [str(REPOSITORY / f"{name}.py") for name in PROGRAMS]
    code = HELP.replace("{names}", repr(PROGRAMS))
    variables = {**os.environ, "PYTHONPATH": str(foreign / "packages"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, *programs]
    done = subprocess.run(command, cwd=foreign, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = done.stdout.splitlines()
    assert len(usages) == len(PROGRAMS)
    for name, usage in zip(PROGRAMS, usages, strict=True):
        assert f"{name}.py" in usage


@pytest.mark.slow
def test_another_package_of_the_name_in_the_current_folder(foreign):
    command = [sys.executable, str(SCRIPT), "--no-such-option"]
    variables = {**os.environ, "PYTHONPATH": str(foreign / "packages")}
    done = subprocess.run(command, cwd=foreign, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-option" in done.stderr


def test_importing_a_program_leaves_the_search_path_alone():
    code = "import sys; before = list(sys.path); import inference; assert sys.path == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
