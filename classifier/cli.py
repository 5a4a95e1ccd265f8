"""The command line: options made from Config, and how a program starts, reports an error and ends.

Exit status: 0 done, 1 failed, 2 wrong usage, 128 + N stopped by signal N (130: Ctrl-C), 141 if
what it prints is no longer read (| head), as other programs end then.
"""

import argparse
import atexit
import difflib
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from classifier import streams
from classifier.config import FIELD_TYPES, Config, flag
from classifier.errors import INSTALL, Stopped, UsageError, UserError, format_error
from classifier.legacy import REMOVED_OPTIONS, RENAMED_CHOICES, RENAMED_OPTIONS
from classifier.recipes import DATASET_DEFAULTS, Settings
from classifier.text import escape_control_characters

# The first setting of each group of options, and the title of the group.
GROUPS = {"dataset": "data", "model": "network", "recipe": "training", "device": "run"}
METAVARS = {
    "labels": "FILE.csv",
    "mirror": "URL",
    "image_size": "PIXELS",
    "init_from": "FILE",
    "minutes": "MINUTES",
    "augment": "LIST",
    "out": "FILE.pth",
    "resume": "DIR",
}
SYNONYMS = {"learning_rate": "lr"}  # tune.py has --learning-rates as well, which is more like it
NOBODY_READS = 141  # exit status: 128 + SIGPIPE, which Windows does not know
PACKAGES = ["torchvision", "numpy", "matplotlib", "torchsummary", "tensorboard", "sklearn"]
EPILOG = (
    "Defaults are for the network cnn on CIFAR-10. Other networks, optimisers and data sets\n"
    "have their own: docs/options.md"
)

# ---- Options from Config -------------------------------------------------------------------------


def build_parser(
    description: str,
    default_recipe: Settings,
    version: str,
    prog: str = "image_classification.py",
) -> argparse.ArgumentParser:
    """A parser with an option for each setting of Config, and --version, which prints `version`.

    The parsed namespace holds only the settings that were given.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version)
    add_config_options(parser, default_recipe)
    return parser


def add_config_options(parser: argparse.ArgumentParser, default_recipe: Settings) -> None:
    """Add an option for each setting of Config, in groups."""
    for title, entries in grouped_fields().items():
        group = parser.add_argument_group(title)
        for entry in entries:
            _add_option(group, entry, default_recipe)


def grouped_fields() -> dict[str, list[Field[Any]]]:
    """The fields of Config by the title of their group."""
    groups: dict[str, list[Field[Any]]] = {}
    title = ""
    for entry in fields(Config):
        title = GROUPS.get(entry.name, title)
        groups.setdefault(title, []).append(entry)
    return groups


def _add_option(
    group: argparse._ArgumentGroup, entry: Field[Any], default_recipe: Settings
) -> None:
    help_text = entry.metadata["help"]
    if FIELD_TYPES[entry.name] is bool:
        group.add_argument(flag(entry.name), action="store_true", help=help_text)
        return
    default = format_default(entry, default_recipe)
    if default:
        help_text += f" (default: {default})"
    choices = entry.metadata["choices"]
    group.add_argument(
        flag(entry.name),
        type=_value_parser(entry.name),
        choices=choices or None,
        metavar=None if choices else metavar(entry.name),
        help=help_text.replace("%", "%%"),
    )


def metavar(name: str) -> str:
    """What stands for an option's value in the help: N for integers, F for other numbers."""
    if name in METAVARS:
        return METAVARS[name]
    expected = FIELD_TYPES[name]
    if expected is int:
        return "N"
    if expected is float:
        return "F"
    last_word = name.split("_")[-1]
    return last_word.upper()


def format_default(entry: Field[Any], default_recipe: Settings) -> str:
    """A setting's default for the network cnn on CIFAR-10, and on the digits where it differs.

    Empty for a setting without a default.
    """
    if entry.default is not None:
        return format_value(entry.default)
    if entry.name not in default_recipe:
        return ""
    default = format_value(default_recipe[entry.name])
    digits = DATASET_DEFAULTS["digits"]
    if digits.get(entry.name, default_recipe[entry.name]) != default_recipe[entry.name]:
        default += f"; digits: {format_value(digits[entry.name])}"
    return default


def format_value(value: Any) -> str:
    """A setting's value as one types it: 0.0005, 0, flip,crop=2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value_parser(name: str) -> Callable[[str], Any]:
    """What argparse calls to read an option's value; choices of version 0.9 get their new name."""
    expected = FIELD_TYPES[name]
    if expected is not str:
        return expected

    def parse(text: str) -> str:
        new_choice = RENAMED_CHOICES.get((name, text))
        if new_choice:
            raise argparse.ArgumentTypeError(f"{text} is now called {new_choice}")
        return text

    return parse


def parse_settings(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """The settings given on the command line, by name.

    arguments: by default those of this process. Ends the program with status 2 if they are wrong.
    """
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        explanation = explain_unknown_option(unknown[0].partition("=")[0], option_names(parser))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{explanation}")
    return vars(given)


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The options that a program shows in its help."""
    names: list[str] = []
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            names += action.option_strings
    return names


def explain_unknown_option(typed: str, known: Sequence[str]) -> str:
    """The option that was meant, as the end of an error message; empty if there is no guess.

    known: all options of the program.
    """
    name = typed.strip("-").replace("-", "_")
    if name in RENAMED_OPTIONS:
        return f": {typed} is now called {flag(RENAMED_OPTIONS[name])}"
    if name in REMOVED_OPTIONS:
        return f": {typed} was removed after version 0.9.1: {REMOVED_OPTIONS[name]}"
    if name in SYNONYMS:
        return f": did you mean {flag(SYNONYMS[name])}?"
    meant = difflib.get_close_matches(typed, known, n=1)
    meant += _options_described_as(name.replace("_", " "))  # --decay: --weight-decay
    return f": did you mean {meant[0]}?" if meant else ""


def _options_described_as(words: str) -> list[str]:
    """The options with these words in their help, the one with the shortest name first."""
    if len(words) < 5:
        return []
    found = []
    for entry in fields(Config):
        if words in entry.metadata["help"].replace("-", " "):
            found.append(flag(entry.name))
    return sorted(found, key=len)


class _RefuseFit(argparse.Action):
    """Ends the process with status 2: a model keeps the --fit of its training."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        parser.error(
            "--fit cannot be changed: the tools use the value of the training: leave it out"
        )


def tool_parser(description: str | None, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all tools have which use a trained model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default=".",
        metavar="FILE",
        help="the model file, or a folder with it (default: the newest model_*.pth)",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="FILE.py:FACTORY",
        help="the network, if it is a custom one",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    hidden = argparse.SUPPRESS
    parser.add_argument("--fit", action=_RefuseFit, default=hidden, help=hidden)
    if device:
        parser.add_argument(
            "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
        )
    return parser


# ---- Start and end of a program ------------------------------------------------------------------


def prepare_console() -> None:
    """Print lines at once, and a ? for each character that the console's encoding lacks.

    What is printed is lost where there is no console (pythonw, 2>&-).
    """
    streams.open_missing()
    atexit.register(streams.drop_unwritable)
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, io.TextIOWrapper):
            console.reconfigure(errors="replace", line_buffering=True)


def prepare_data_output() -> None:
    """Write UTF-8 to a file or pipe, for data that another program reads.

    On Windows it would be the console's encoding. Names that are not UTF-8 are escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def check_installed() -> None:
    """Raise UserError if a package is missing: some are imported only after training."""
    for package in PACKAGES:
        if not importlib.util.find_spec(package):
            raise UserError(f"No module named {package!r}: {INSTALL}")


def run_tool(main: Callable[[], int]) -> int:
    """Run a tool from the command line; returns its exit status.

    An error is printed in one line, or raised again with --debug.
    """
    prepare_console()
    return run_program(main, debug="--debug" in sys.argv, is_tool=True)


def end_process(status: int) -> NoReturn:
    """End this process as sys.exit does, but without unloading libraries, which takes seconds."""
    atexit._run_exitfuncs()
    for console in (sys.stdout, sys.stderr):
        console.flush()
    os._exit(status)


def run_program(
    main: Callable[[], int],
    parser: argparse.ArgumentParser | None = None,
    debug: bool = False,
    is_tool: bool = False,
    before_report: Callable[[], None] | None = None,
) -> int:
    """Call `main`, which returns an exit status; returns that, or the status of its error.

    Args:
        main: the program.
        parser: whose usage is printed after wrong usage.
        debug: raise errors again, except for wrong usage.
        is_tool: see `format_error`.
        before_report: called before an error is printed.
    """
    try:
        return main()
    except (KeyboardInterrupt, Stopped) as stopped:
        print("\nStopped", file=sys.stderr)
        return exit_status(stopped)
    except Exception as error:
        reported: Exception = error
        if _is_of_console(error):
            if error.errno in streams.CLOSED_PIPE:
                return NOBODY_READS
            reported = OSError(error.errno, error.strerror, "standard output")
        if debug and not isinstance(error, UsageError):
            raise
        if before_report is not None:
            before_report()
        report_error(reported, parser, is_tool)
        return exit_status(error)


def _is_of_console(error: Exception) -> TypeGuard[OSError]:
    """Whether an error is that of printing. Nothing more is then printed to where it arose."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    return error.errno in streams.drop_unwritable()


def exit_status(error: BaseException) -> int:
    """The exit status of a program that ends with this error."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, Stopped):
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def report_error(
    error: Exception,
    parser: argparse.ArgumentParser | None = None,
    is_tool: bool = False,
) -> None:
    """Print what is wrong, in one line on standard error; after wrong usage below the usage.

    A name in it may be a stranger's: its control characters are escaped.
    """
    message = escape_control_characters(format_error(error, is_tool))
    if not isinstance(error, UsageError):
        print(f"error: {message}", file=sys.stderr)
        return
    prog = Path(sys.argv[0]).name if parser is None else parser.prog
    usage = f"usage: {prog} [options]\n" if parser is None else parser.format_usage()
    print(f"{usage}{prog}: error: {message}", file=sys.stderr)


def report_stopped(stopped: Stopped, command: list[str]) -> int:
    """Print the command that resumes a stopped run; returns the exit status."""
    print(f"\nStopped, and everything is saved. Resume with: {command_line(command)}")
    return exit_status(stopped)


def resume_command(run: Path | str, to_repeat: Mapping[str, str]) -> list[str]:
    """The command that resumes a run.

    to_repeat: settings that the run folder does not decide on, by name.
    """
    command = [python_command(), sys.argv[0], "--resume", str(run)]
    for name, value in to_repeat.items():
        command += [flag(name), value]
    return command


def program(name: str) -> list[str] | None:
    """The command that starts a program of this project, from the current folder.

    name: of a file beside classifier/. None if it is not there, as in a .pyz.
    """
    path = Path(__file__).absolute().parent.parent / name
    if not path.exists():
        return None
    as_called = Path(sys.argv[0]).parent / name  # ../inference.py, after ../image_classification.py
    if as_called.exists() and as_called.samefile(path):
        path = as_called
    return [python_command(), str(path)]


def python_command() -> str:
    """The command that starts this Python."""
    found = shutil.which("python")
    if found and os.path.normcase(found) == os.path.normcase(sys.executable):
        return "python"
    return sys.executable


def command_line(words: Sequence[str]) -> str:
    """A command as one types it, quoted for the shell of this system."""
    if os.name != "nt":
        return shlex.join(words)
    quoted = []
    for word in words:
        text = subprocess.list2cmdline([word])
        is_plain = re.fullmatch(r"[\w.:\\/-]+", word) is not None
        quoted.append(text if is_plain or text != word else f'"{word}"')  # C:\R&D
    return " ".join(quoted)
