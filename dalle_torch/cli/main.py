"""`dalle-torch COMMAND`: finds the commands, runs one, and turns every failure into one line and an exit status.

Owns: the list of commands, what all of them share (`--debug`, `--version`), exit statuses, error messages.
A command is a module beside this one: the first line of its docstring is its help, `add_arguments(parser)` declares
its options and `run(args) -> int | None` does the work. Modules import what is heavy inside `run`.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

import dalle_torch.cli

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; 130 is a shell's own for Ctrl-C."""

_MAX_MESSAGE = 2000


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is behind `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, but for those that only mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `dalle-torch`; None takes the process's own.

    Returns:
        The exit status: 0; 1 for a failure, told in one line on stderr; 130 after Ctrl-C. A misspelt command line
        leaves through `SystemExit(2)`, `--help` and `--version` through `SystemExit(0)`.
    """
    args = None
    try:
        try:
            args = build_parser().parse_args(argv)
            return _run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("dalle-torch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); Python would complain again when it closes stdout.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if args is not None and args.debug:
            traceback.print_exc()
        print(f"dalle-torch: error: {describe(error)}", file=sys.stderr)
        # Some errors have one of their own (`parallel.launched.PeersLostError`).
        return getattr(error, "exit_status", FAILURE)


def _run(args: argparse.Namespace) -> int:
    if getattr(args, "device", None) is None or not args.device.startswith("xla"):
        # Where torch_xla is installed, transformers would load it on import: seconds, and a device nobody asked for.
        os.environ.setdefault("USE_TORCH_XLA", "0")
    return args.run(args) or SUCCESS


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="dalle-torch", description="DALL·E Mini and Mega in PyTorch: prompts to pictures.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in find_commands():
        summary = (module.__doc__ or name).strip().splitlines()[0]
        command = commands.add_parser(
            name, help=summary.rstrip("."), description=summary, formatter_class=_HelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def find_commands() -> Iterator[tuple[str, ModuleType]]:
    """(name, module) of every command, in alphabetical order."""
    for found in pkgutil.iter_modules(dalle_torch.cli.__path__):
        if found.name == "main" or found.name.startswith("_"):
            continue
        module = importlib.import_module(f"{dalle_torch.cli.__name__}.{found.name}")
        if hasattr(module, "add_arguments") and hasattr(module, "run"):
            yield found.name.replace("_", "-"), module


def describe(error: BaseException) -> str:
    """One line for `error`: its own words where it was raised for the user, its type as well where it is our defect."""
    message = _one_line(str(error))
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{_one_line(str(error.filename))}: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {message or 'no more could be had'}"
    # safetensors reports a full disk or a file it cannot write by an error of its own; its import is heavy.
    known = isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ == "SafetensorError"
    if known and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _one_line(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}..."


class _Version(argparse.Action):
    """Prints the version; its own action, so that the metadata are read only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dalle_torch import __version__

        print(f"dalle-torch {__version__}")
        parser.exit(SUCCESS)


if __name__ == "__main__":
    sys.exit(main())
