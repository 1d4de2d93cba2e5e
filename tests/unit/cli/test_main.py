"""What all commands share: help without heavy imports, one line for every failure, exit statuses."""

import argparse
import os
import subprocess
import sys

import pytest

from dalle_torch import __version__
from dalle_torch.cli import main as cli
from dalle_torch.cli.main import describe, find_commands, main


@pytest.fixture
def command(monkeypatch):
    """Replaces the commands by one, `try`, whose `run` is what the test sets."""

    class Command:
        """Try something."""

        @staticmethod
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--number", type=int, default=3, help="a number")
            parser.add_argument("--name", help="a name")

        run = None

    monkeypatch.setattr(cli, "find_commands", lambda: iter([("try", Command)]))
    return Command


def run(argv, capsys):
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_command_is_found_with_its_help(capsys):
    names = [name for name, _ in find_commands()]
    assert {"generate", "demo", "convert"} <= set(names)
    assert names == sorted(names)
    for name in names:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: dalle-torch {name}" in text
        assert "--debug" in text
        assert "default: None" not in text


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from dalle_torch.cli.main import build_parser; build_parser().format_help();"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dalle-torch {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["try", "--number", "x"], ["try", "--nmae", "x"]])
def test_a_misspelt_command_line_is_one_line_and_status_2(argv, command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "error: " in captured.err
    assert "--help" in captured.err


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_the_command_returns(returned, status, command, capsys):
    command.run = staticmethod(lambda args: returned)
    assert run(["try"], capsys) == (status, "", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("num=0 is\n  too small"), "num=0 is too small"),
        (FileNotFoundError(2, "No such file or directory", "a\x1b[31m.txt"), "a [31m.txt: No such file or directory"),
        (OSError("the disk is full"), "the disk is full"),
        (ImportError("wandb is not installed"), "wandb is not installed"),
        (MemoryError(), "out of memory: no more could be had"),
        (KeyError("tokens"), "KeyError: 'tokens' (--debug shows where)"),
        (ValueError("x" * 5000), "x" * 2000 + "..."),
    ],
)
def test_a_failure_is_one_line_without_traceback(error, line, command, capsys):
    def fail(args):
        raise error

    command.run = staticmethod(fail)
    assert run(["try"], capsys) == (1, "", f"dalle-torch: error: {line}\n")


def test_debug_shows_the_traceback(command, capsys):
    def fail(args):
        raise ValueError("because")

    command.run = staticmethod(fail)
    status, _, err = run(["try", "--debug"], capsys)
    assert status == 1
    assert "Traceback" in err
    assert err.endswith("dalle-torch: error: because\n")


def test_ctrl_c_is_130(command, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    command.run = staticmethod(interrupted)
    assert run(["try"], capsys) == (130, "", "dalle-torch: interrupted\n")


def test_memory_that_ran_out_on_a_gpu_is_named():
    import torch

    assert describe(torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")) == (
        "out of memory: CUDA out of memory. Tried 2 GiB"
    )


def test_what_safetensors_cannot_write_is_told_in_its_words():
    from safetensors import SafetensorError

    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert describe(SafetensorError(message)) == message


def test_torch_xla_stays_out_unless_asked_for(command, monkeypatch):
    command.run = staticmethod(lambda args: None)
    monkeypatch.delenv("USE_TORCH_XLA", raising=False)
    main(["try"])
    assert os.environ["USE_TORCH_XLA"] == "0"
    monkeypatch.delenv("USE_TORCH_XLA")
    monkeypatch.setattr(
        command, "add_arguments", staticmethod(lambda parser: parser.add_argument("--device", default="auto"))
    )
    main(["try", "--device", "xla:1"])
    assert "USE_TORCH_XLA" not in os.environ


def test_a_reader_that_left_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dalle_torch.cli.main", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
