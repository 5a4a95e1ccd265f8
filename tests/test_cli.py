"""The command line: options, suggestions, errors in one line, exit statuses."""

import argparse
import dataclasses
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from classifier import cli
from classifier.config import FIELD_TYPES, Config, flag
from classifier.errors import INSTALL_EXTRAS, Stopped, UsageError, UserError
from classifier.legacy import REMOVED_OPTIONS, RENAMED_OPTIONS
from classifier.options_page import DETAILS, options_page
from classifier.recipes import NETWORK_DEFAULTS, OPTIMIZER_DEFAULTS, RECIPES
from classifier.text import has_control_characters

DEFAULT_RECIPE = {
    "optimizer": "muon",
    "lr": 0.12,
    "momentum": 0.6,
    "weight_decay": 0.0,
    "width": 1.0,
    "epochs": 10,
    "batch_size": 500,
    "micro_batch": 500,
    "augment": "flip,crop=2",
    "progressive_resizing": 0.7,
    "label_smoothing": 0.2,
    "scheduler": "linear",
}


def new_parser():
    return cli.build_parser("Train.", DEFAULT_RECIPE, "image_classification 1.2.3")


def parse(*arguments):
    return cli.parse_settings(new_parser(), arguments)


@pytest.fixture
def usage_error(capsys):
    """A function that parses wrong arguments and returns the last line of standard error."""

    def parse_wrong(*arguments):
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2
        usage, *_, line = capsys.readouterr().err.strip().splitlines()
        assert usage.startswith("usage: image_classification.py")
        assert line.startswith("image_classification.py: error: ")
        return line

    return parse_wrong


# ---- options -------------------------------------------------------------------------------------


def test_every_setting_is_in_the_help():
    text = new_parser().format_help()
    for name in FIELD_TYPES:
        assert re.search(rf"^  {flag(name)}\b", text, re.MULTILINE), name
    for title in ("data:", "network:", "training:", "run:"):
        assert re.search(rf"^{title}$", text, re.MULTILINE)
    assert len(text) > 2000 and max(map(len, text.splitlines())) <= 100


def test_help_has_the_defaults_of_the_default_recipe():
    text = " ".join(new_parser().format_help().split())
    assert "peak learning rate (default: 0.12)" in text
    assert "(default: 10; digits: 8)" in text
    assert "(default: flip,crop=2; digits: crop=2)" in text
    assert "(default: )" not in text and "(default: None)" not in text


def test_only_what_is_given_is_returned():
    assert parse() == {}
    given = parse("--epochs", "3", "--lr=0.5", "--ema", "--out", "a b.pth", "--tta", "6")
    assert given == {"epochs": 3, "lr": 0.5, "ema": True, "out": "a b.pth", "tta": 6}
    assert parse("--recipe=") == {"recipe": ""}


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == "image_classification 1.2.3"


@given(
    st.sampled_from([name for name, kind in FIELD_TYPES.items() if kind is not bool]),
    st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str)),
)
@example("epochs", "0")
@example("val_fraction", "nan")
@example("lr", "1e400")
@settings(deadline=None, max_examples=100, derandomize=True, database=None)
def test_settings_are_in_range_or_refused(name, text):
    stderr = sys.stderr
    sys.stderr = io.StringIO()
    try:
        config = Config(**parse(f"{flag(name)}={text}"))
    except SystemExit as error:
        assert error.code == 2
    except UsageError as error:
        assert flag(name) in str(error) or "--val-fraction" in str(error)
    else:
        assert type(getattr(config, name)) is FIELD_TYPES[name]
    finally:
        sys.stderr = stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--epochs ten", "--epochs"),
        ("--lr fast", "--lr"),
        ("--optimizer lion", "--optimizer"),
        ("--tta 3", "--tta"),
        ("--epoch 3", "--epochs"),
        ("--learning-rate 3", "--lr"),
        ("--learning-rate=3", "--lr"),
        ("--test-time-augmentation", "--tta"),
        ("--moving-average", "--ema"),
        ("--nothing-like-it", "--nothing-like-it"),
        ("stray", "stray"),
    ],
)
def test_wrong_usage_names_the_option(arguments, named, usage_error):
    assert re.search(rf"{named}\b", usage_error(*arguments.split()))


def test_suggestion_ends_with_a_question_mark(usage_error):
    assert usage_error("--epoch", "3").endswith("did you mean --epochs?")
    assert usage_error("--learning-rate=3").endswith("did you mean --lr?")
    assert "did you mean" not in usage_error("--zzz")


@pytest.mark.parametrize("old", RENAMED_OPTIONS)
def test_old_name_of_an_option_leads_to_the_new_one(old, usage_error):
    for arguments in ([flag(old), "1"], [f"{flag(old)}=1"]):
        assert flag(RENAMED_OPTIONS[old]) in usage_error(*arguments)


def test_old_name_of_a_choice_leads_to_the_new_one(usage_error):
    for arguments in (["--scheduler", "onecycle"], ["--scheduler=onecycle"]):
        line = usage_error(*arguments)
        assert "--scheduler" in line and "linear" in line and "onecycle" in line
    assert parse("--out", "onecycle") == {"out": "onecycle"}


@pytest.mark.parametrize("old", REMOVED_OPTIONS)
def test_removed_option_says_so(old, usage_error):
    line = usage_error(flag(old), "3")
    assert "0.9.1" in line and REMOVED_OPTIONS[old] in line


def test_parser_can_be_the_parent_of_another():
    child = argparse.ArgumentParser(parents=[new_parser()], conflict_handler="resolve")
    child.add_argument("--repeat", type=int, default=5)
    options = vars(child.parse_args(["--epochs", "3"]))
    assert options == {"epochs": 3, "repeat": 5}


def test_options_of_tools():
    options = cli.tool_parser("Look inside.").parse_args(["--checkpoint", "a.pth"])
    expected = {"checkpoint": "a.pth", "model": "", "debug": False, "device": "auto"}
    assert vars(options) == expected
    assert "device" not in vars(cli.tool_parser(None, device=False).parse_args([]))


# ---- docs/options.md -----------------------------------------------------------------------------


def test_page_of_options_is_complete():
    page = options_page(DEFAULT_RECIPE)
    for entry in dataclasses.fields(Config):
        assert re.search(rf"^\| `{flag(entry.name)}\b", page, re.MULTILINE), entry.name
        assert entry.metadata["help"] in page
        for choice in entry.metadata["choices"]:
            assert f"`{choice}`" in page
    assert "`--recipe default` sets nothing" in page and not RECIPES["default"]
    recipes = RECIPES.keys() - {"default"}
    for name in [*recipes, *NETWORK_DEFAULTS, *OPTIMIZER_DEFAULTS, "muon"]:
        assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE), name
    assert page.endswith("|\n") and DETAILS.keys() <= FIELD_TYPES.keys()


def test_tables_of_the_page_have_equal_columns():
    columns = None
    for line in options_page(DEFAULT_RECIPE).splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (None, count), line
        columns = count


# ---- start and end of a program ------------------------------------------------------------------


def fail(error):
    raise error


def run(error, **options):
    return cli.run_program(lambda: fail(error), **options)


def test_status_of_a_program_that_ends_well():
    assert cli.run_program(lambda: 0) == 0
    assert cli.run_program(lambda: 1) == 1


@pytest.mark.parametrize(
    ("error", "status", "named"),
    [
        (UserError("no such  \n thing"), 1, "error: no such thing"),
        (FileNotFoundError(2, "No such file", "a.pth"), 1, "error: a.pth"),
        (OSError(28, "No space left on device", "b.pth"), 1, "error: b.pth: No space left"),
        (MemoryError(), 1, "--batch-size"),
        (ModuleNotFoundError("No module named 'kornia'"), 1, "pip install"),
        (ZeroDivisionError("oops"), 1, "--debug"),
        (KeyboardInterrupt(), 130, "Stopped"),
        (Stopped(signal.SIGTERM), 143, "Stopped"),
    ],
)
def test_error_is_one_line_and_a_status(error, status, named, capsys):
    assert run(error) == status == cli.exit_status(error)
    out, err = capsys.readouterr()
    assert not out and named in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        UserError("a\x1b[2Jb names \x9b5nc"),
        UsageError("\x07: choose"),
        FileNotFoundError(2, "No such file", "a\x1b]0;title\x07\nb.pth"),
        ValueError("\x1b[2J"),
    ],
)
def test_strangers_names_do_not_reach_the_terminal(error, capsys):
    run(error)
    err = capsys.readouterr().err
    assert "error: " in err and not has_control_characters(err.replace("\n", ""))
    assert len(err.strip().splitlines()) == 1 + isinstance(error, UsageError)


def test_wrong_usage_is_printed_below_the_usage(capsys, monkeypatch):
    error = UsageError("--lr 0: too small")
    assert run(error, parser=new_parser()) == 2
    parsed = capsys.readouterr().err.splitlines()
    assert parsed[0].startswith("usage: image_classification.py")
    assert parsed[-1] == "image_classification.py: error: --lr 0: too small"
    monkeypatch.setattr(sys, "argv", [str(Path("somewhere", "tune.py")), "--study", "a"])
    assert cli.run_tool(lambda: fail(error)) == 2
    unparsed = capsys.readouterr().err.splitlines()
    assert unparsed[0].startswith("usage: tune.py")
    assert unparsed[1:] == ["tune.py: error: --lr 0: too small"]


def test_debug_shows_where(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError(), debug=True)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--debug"])
    with pytest.raises(UserError):
        cli.run_tool(lambda: fail(UserError("no")))
    assert cli.run_tool(lambda: fail(UsageError("no"))) == 2


def test_tool_says_how_to_install_what_it_misses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert cli.run_tool(lambda: fail(ModuleNotFoundError("No module named 'optuna'"))) == 1
    assert INSTALL_EXTRAS in capsys.readouterr().err


END = """
import atexit, sys, threading, time
from classifier.cli import end_process

class Slow:
    def __del__(self):
        time.sleep(20)  # as libraries that are unloaded

slow = Slow()
atexit.register(print, "last words")
print("printed", end="")
sys.stderr.write("an error")
end_process(3)
"""


def test_process_ends_at_once_with_all_that_was_printed():
    began = time.perf_counter()
    command = [sys.executable, "-c", END]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert time.perf_counter() - began < 15
    assert ended.returncode == 3
    assert ended.stdout == "printedlast words\n" and ended.stderr == "an error"


def test_something_can_be_done_before_an_error_is_printed(capsys):
    seen = []
    run(UserError("no"), before_report=lambda: seen.append(capsys.readouterr().err))
    assert seen == [""] and "no" in capsys.readouterr().err


def test_long_errors_are_cut(capsys):
    assert run(RuntimeError("long " * 1000)) == 1
    assert len(capsys.readouterr().err) < 700


def test_missing_package_is_named(monkeypatch):
    cli.check_installed()
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    with pytest.raises(UserError, match=r"torchsummary.*pip install -r requirements\.txt"):
        cli.check_installed()


def test_console_that_knows_only_ascii(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli.prepare_console()
    print("1 × 1")
    assert raw.getvalue().split() == [b"1", b"?", b"1"]  # at the end of the line, not of the run


def test_console_that_is_no_text_file(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.prepare_console()


def test_command_that_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--epochs", "3"])
    monkeypatch.setattr(cli.shutil, "which", lambda name: sys.executable)
    expected = ["python", "image_classification.py", "--resume", "run"]
    assert cli.resume_command(Path("run"), {}) == expected
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    command = cli.resume_command("run", {"out": "there/model.pth"})
    assert command[2:] == ["--resume", "run", "--out", "there/model.pth"]
    command = cli.resume_command("run", {"model": "mine.py:net"})
    assert command == [sys.executable, *expected[1:], "--model", "mine.py:net"]


def test_program_beside_this_one_is_named_as_this_one_was(folder, monkeypatch):
    tool = cli.program("inference.py")
    assert tool is not None and Path(tool[1]) == REPOSITORY / "inference.py"
    as_called = Path(os.path.relpath(REPOSITORY))
    monkeypatch.setattr(sys, "argv", [str(as_called / "image_classification.py")])
    tool = cli.program("inference.py")
    assert tool is not None and tool[1] == str(as_called / "inference.py")
    assert cli.program("nothing.py") is None


def test_commands_are_quoted_for_the_shell(monkeypatch):
    words = ["python", "a b.py", "it's.pth", "R&D/50%.pth", "plain/x-1.pth"]
    assert shlex.split(cli.command_line(words)) == words
    monkeypatch.setattr(cli.os, "name", "nt")
    words = ["python", "a b.py", "R&D\\x.pth", "C:\\x-1.pth", "it's"]
    assert cli.command_line(words) == 'python "a b.py" "R&D\\x.pth" C:\\x-1.pth "it\'s"'


def test_importing_needs_no_torch():
    modules = "config, recipes, cli, errors, files, progress, legacy, text, options_page"
    code = f"from classifier import {modules}\nimport sys\nassert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
