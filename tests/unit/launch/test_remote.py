"""The part on the hosts, where the launcher's tests do not reach: silence, and old Pythons."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.unit.launch.conftest import REPOSITORY, alive, wait_for

SOURCE = (REPOSITORY / "launch" / "remote.py").read_text(encoding="utf-8")


def order(folder: Path, *argv: str, **more: Any) -> bytes:
    fields = {
        "program": SOURCE, "argv": argv, "env": {}, "workdir": str(folder), "run": "a", "nonce": "n", "grace": 5.0,
        "patience": 5.0, "lease": 60.0, "takeover": False, **more,
    }  # fmt: skip
    return json.dumps(fields).encode() + b"\n"


def start(folder: Path) -> "subprocess.Popen[bytes]":
    from launch.workers import _BOOT

    return subprocess.Popen(
        [sys.executable, "-u", "-c", _BOOT, "n"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"XLA_DIST_STATE": str(folder / "state"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_a_host_that_hears_nothing_stops_its_command(tmp_path: Path) -> None:
    """The connection is open all the while, as it is where a network has gone without a word."""
    with start(tmp_path) as host:
        assert host.stdin is not None and host.stdout is not None
        host.stdin.write(order(tmp_path, "sh", "-c", "echo $$ > pid; exec sleep 600", lease=0.5))
        host.stdin.flush()
        assert host.wait(timeout=60) == 128 + 15
        output = host.stdout.read().decode()
    assert "nothing was heard of the launcher" in output
    assert output.endswith("\x1exla_dist n exit 143\n")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_command_does_not_outlive_its_watcher(tmp_path: Path) -> None:
    with start(tmp_path) as host:
        assert host.stdin is not None
        host.stdin.write(order(tmp_path, "sh", "-c", "echo $$ > pid; exec sleep 600"))
        host.stdin.flush()
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the command")
        host.kill()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())), "the command's end")


def test_the_last_output_is_kept_on_the_host(tmp_path: Path) -> None:
    with start(tmp_path) as host:
        out, _ = host.communicate(order(tmp_path, "echo", "hello"), timeout=60)
    assert b"hello\n" in out
    assert (tmp_path / "state" / "output.log").read_text() == "hello\n"
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_host_that_is_told_nothing_does_nothing(tmp_path: Path) -> None:
    with start(tmp_path) as host:
        out, _ = host.communicate(timeout=60)
    assert out == b"\x1exla_dist n hello\n"
    assert host.returncode == 1


def test_it_is_written_for_the_python_of_a_tpu_vm() -> None:
    """3.8 and later; the run itself has a newer one."""
    ast.parse(SOURCE, feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(SOURCE))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= sys.stdlib_module_names
