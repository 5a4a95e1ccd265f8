"""image_classification.pyz: one file that does what the script does, alone in an empty folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
from conftest import QUICK, REPOSITORY, Program, only_run, report_of, state_of

from classifier import bundle, reports


@pytest.fixture(scope="session")
def bundle_file(tmp_path_factory):
    """A bundle, as the command makes it."""
    path = tmp_path_factory.mktemp("bundle") / "image_classification.pyz"
    command = [sys.executable, "-m", "classifier.bundle", "--out", path]
    subprocess.run(list(map(str, command)), check=True, cwd=REPOSITORY, capture_output=True)
    return path


@pytest.fixture
def bundled(folder, bundle_file):
    """The bundle in an otherwise empty folder, without the repository on the path."""
    path = folder / "image_classification.pyz"
    shutil.copy(bundle_file, path)
    return Program(folder, path)


@pytest.mark.slow
def test_same_sources_give_the_same_bytes(bundle_file):
    assert bundle.build_bundle(REPOSITORY) == bundle_file.read_bytes()


@pytest.mark.slow
def test_it_holds_sources_only(bundle_file):
    names = zipfile.ZipFile(bundle_file).namelist()
    assert "image_classification.py" in names and "classifier/train_state.py" in names
    others = [name for name in names if not name.endswith((".py", "/"))]
    assert others == [f"classifier/{bundle.COMMIT_FILE}"]


@pytest.mark.slow
def test_it_trains_and_says_what_it_is_made_of(bundled, folder):
    out, _ = bundled(*QUICK, "--epochs", "1", env={"PYTHONPATH": ""})
    assert "Accuracy of the network on the 359 test images" in out
    report = report_of(only_run(folder))
    script = (REPOSITORY / "image_classification.py").read_text(encoding="utf-8")
    assert report["versions"]["script"] == reports.versions(script)["script"]
    assert report["commit"] == reports.commit(REPOSITORY / "image_classification.py")
    assert (folder / "model_cnn_digits.pth").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_it_is_resumed_by_the_command_that_it_prints(bundled, folder):
    process = bundled.start(*QUICK, "--epochs", "50", env={"PYTHONPATH": ""})
    next(line for line in process.stdout if line.startswith("Epoch 0001"))
    process.send_signal(signal.SIGINT)
    out, _ = bundled.finish(process, 130, timeout=60)
    command = re.search(r"\bpython\S* (.+) --resume (\S+)", out)
    assert os.path.samefile(folder / command[1].strip("'\""), bundled.script)
    steps = state_of(only_run(folder))["step"]
    process = bundled.start("--resume", command[2], env={"PYTHONPATH": ""})
    next(line for line in process.stdout if f"after step {steps} of" in line)
    process.send_signal(signal.SIGTERM)
    bundled.finish(process, 143, timeout=60)


def test_missing_packages_are_named(bundled, folder):
    code = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; {RUN}"
    command = [sys.executable, "-I", "-c", code, str(bundled.script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 1
    assert result.stderr.startswith("error: No module named 'torch'")
    assert '"scikit-learn>=' in result.stderr and len(result.stderr.splitlines()) == 1


RUN = "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.mark.slow
def test_two_processes_train_from_it(bundled, folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bundled.launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out, _ = bundled(*QUICK, "--device", "cpu", env={"PYTHONPATH": ""})
    assert "2 processes share each batch" in out and out.count("Finished Training") == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no compiler")
def test_it_compiles(bundled, folder):
    options = ["--dataset", "digits", "--model", "fcn", "--image-size", "8", "--fast-dev-run"]
    bundled(*options, "--precision", "fp32", "--compile", timeout=600)
    assert only_run(folder).joinpath("model_fcn_digits.pth").exists()


def test_a_folder_without_the_script_is_refused(tmp_path):
    with pytest.raises(bundle.UserError, match=r"image_classification\.py"):
        bundle.build_bundle(tmp_path)
