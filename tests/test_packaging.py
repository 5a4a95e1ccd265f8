"""What is said in more than one place is the same everywhere: requirements, versions, examples."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import QUICK, REPOSITORY, SCRIPT, only_run, report_of

import classifier
import image_classification as ic
from classifier import cli
from classifier.options_page import options_page

# Packages by the names of their modules, and those that come with a required one.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "scipy": "scikit-learn",
    "PIL": "torchvision",
    "filelock": "torch",
}


def read(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def requirements(name):
    """The packages in a file of requirements, without their versions."""
    lines = [line for line in read(name).splitlines() if line and not line.startswith(("#", "-r"))]
    return {re.match(r"[\w-]+", line)[0] for line in lines}


def imported_packages(path):
    """The packages from elsewhere that a module imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, "classifier", "image_classification"}
    return {DISTRIBUTIONS.get(name, name) for name in names}


# ---- requirements ----


def test_script_metadata_equals_requirements():
    block = re.search(r"# /// script\n(.*?)# ///", read("image_classification.py"), re.DOTALL)[1]
    assert re.findall(r'"(\S+)",', block) == read("requirements.txt").split()
    assert '# requires-python = ">=3.10"' in block


def test_requirements_build_on_each_other():
    assert "-r requirements.txt" in read("requirements-extras.txt")
    assert "-r requirements-tools.txt" in read("requirements-extras.txt")
    assert "-r requirements-extras.txt" in read("requirements-dev.txt")


def test_everything_that_is_imported_is_required():
    required = requirements("requirements.txt") | requirements("requirements-tools.txt")
    used_if_installed = {"pillow_heif"}
    for path in [SCRIPT, *(REPOSITORY / "classifier").rglob("*.py")]:
        assert imported_packages(path) <= required | used_if_installed, path


def test_plain_run_needs_no_extras(inside, monkeypatch):
    for name in requirements("requirements-tools.txt"):
        monkeypatch.setitem(sys.modules, name, None)
    inside(*QUICK, "--fast-dev-run")


def test_packages_that_a_run_imports_late_are_looked_for_at_its_start():
    late = requirements("requirements.txt") - {"torch", "tqdm"}  # imported by the script itself
    assert {DISTRIBUTIONS.get(name, name) for name in cli.PACKAGES} == late


# ---- pip install . ----


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder into which pip installed a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    shutil.copytree(REPOSITORY / "classifier", copy / "classifier")
    for name in ("pyproject.toml", "README.md", "LICENSE", SCRIPT.name):
        shutil.copy(REPOSITORY / name, copy)
    for path in REPOSITORY.glob("requirements*.txt"):
        shutil.copy(path, copy)
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(folder), str(copy)]
    subprocess.run(command, check=True)
    return folder


def run_installed(installed, folder, *arguments):
    """Run the installed command in this folder; returns what it prints."""
    command = installed / "bin" / "image-classification"
    result = subprocess.run(
        [command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_installed_command_is_this_version_and_trains(installed, tmp_path):
    version = run_installed(installed, tmp_path, "--version")
    assert classifier.__version__ in version
    out = run_installed(installed, tmp_path, *QUICK, "--epochs", "1")
    assert "Accuracy of the network on the 359 test images" in out
    report = report_of(only_run(tmp_path))
    assert report["versions"]["script"] == ic.VERSIONS["script"]


@pytest.mark.slow
def test_installed_package_is_whole(installed):
    sources = {path.relative_to(REPOSITORY) for path in REPOSITORY.glob("classifier/**/*.py")}
    assert sources == {path.relative_to(installed) for path in installed.glob("classifier/**/*.py")}


@pytest.mark.slow
def test_installed_metadata_is_that_of_the_requirements_files(installed):
    (path,) = installed.glob("image_classification-*.dist-info/METADATA")
    metadata = path.read_text(encoding="utf-8")
    assert f"\nVersion: {classifier.__version__}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    extra = re.findall(r"^Requires-Dist: ([\w-]+).*extra == .extras.", metadata, re.MULTILINE)
    assert set(required) == requirements("requirements.txt")
    assert set(extra) == requirements("requirements-tools.txt")


# ---- versions ----


def test_version_is_the_same_everywhere(inside):
    version = inside("--version")[0].split()[1].rstrip(",")
    newest = re.search(r"^## (\d\S+),", read("CHANGELOG.md"), re.MULTILINE)[1]
    cited = re.search(r"^version: (\S+)", read("CITATION.cff"), re.MULTILINE)[1]
    assert version == classifier.__version__ == newest == cited


def test_version_names_what_a_result_depends_on(inside):
    text, _ = inside("--version")
    for name in ("image_classification", "python", "torch", "platform", "script"):
        assert re.search(rf"\b{name} \S", text), name


# ---- documents ----


def test_page_of_options_is_up_to_date():
    if not (REPOSITORY / "docs" / "options.md").exists():
        pytest.skip("there is no docs/options.md")
    assert read("docs/options.md") == options_page(ic.DEFAULT_RECIPE)


def test_examples_of_additions_are_the_real_ones():
    """Each ```diff block of CONTRIBUTING.md names a file and shows lines of it, in their order."""
    blocks = re.findall(r"```diff\n\+\+\+ (\S+)\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    assert len(blocks) >= 4  # a network, a data set, an augmentation, a recipe
    for path, block in blocks:
        lines = iter(read(path).splitlines())
        for shown in block.splitlines():
            assert shown[1:] in lines, f"{path}: {shown}"


def test_commands_in_documents_use_options_that_exist():
    known = {"--help", "--version", *map(ic.cli.flag, ic.cli.FIELD_TYPES)}
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/*.md")]:
        commands = re.findall(
            r"python image_classification\.py[^\n`#|&>]*", path.read_text("utf-8")
        )
        for command in commands:
            used = set(re.findall(r"(?<=\s)--[a-z][\w-]*", command))
            assert used <= known, f"{path.name}: {command}"
