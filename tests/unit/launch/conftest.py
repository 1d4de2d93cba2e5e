"""A cloud on this machine: see `stand_in_gcloud`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
NAME, ZONE = "pod", "europe-west4-a"
PATIENCE = 60.0
"""Seconds that a test waits for what should come at once; a machine may be busy."""


def wait_for(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs, and does not only wait to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Cloud:
    """The stand-in's folder, and the launcher run against it."""

    def __init__(self, root: Path, hosts: int = 2) -> None:
        self.root, self.count = root, hosts
        self.launched: list[subprocess.Popen[str]] = []
        (root / "bin").mkdir(parents=True)
        (root / "host-bin").mkdir()
        stand_in = Path(__file__).with_name("stand_in_gcloud.py")
        self._program(root / "bin" / "gcloud", f'exec "{sys.executable}" -S -E "{stand_in}" "$@"')
        for name in ("python", "python3"):
            self._program(root / "host-bin" / name, f'exec "{sys.executable}" "$@"')
        for host in range(hosts):
            self.home(host).joinpath("dalle-torch").mkdir(parents=True)
        self.describe()

    @staticmethod
    def _program(path: Path, line: str) -> None:
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def home(self, host: int) -> Path:
        return self.root / f"host-{host}"

    def describe(self, state: str = "READY", **more: Any) -> None:
        endpoints = [
            {"ipAddress": f"10.164.0.{host + 2}", "port": 8470, "accessConfig": {"externalIp": f"34.90.0.{host + 1}"}}
            for host in range(self.count)
        ]
        description = {"acceleratorType": "v3-16", "state": state, "networkEndpoints": endpoints, **more}
        temporary = self.root / "node.tmp"
        temporary.write_text(json.dumps({"name": NAME, "zone": ZONE, "description": description}))
        temporary.rename(self.root / "node.json")

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.root / "calls.jsonl").read_text().splitlines()]

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "STAND_IN_GCLOUD": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *words: str, zone: str = ZONE, **env: str) -> "subprocess.Popen[str]":
        launcher = str(REPOSITORY / "launch" / "xla_dist.py")
        process = subprocess.Popen(
            [sys.executable, launcher, "--tpu", NAME, "--zone", zone, "--settle", "0", "--log-dir",
             str(self.root / "logs"), *words],
            cwd=self.root, env={**self.env, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.launched.append(process)
        return process

    def finish(self, process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, *words: str, zone: str = ZONE, **env: str) -> "subprocess.CompletedProcess[str]":
        return self.finish(self.start(*words, zone=zone, **env))

    def log(self, host: int) -> str:
        return (self.root / "logs" / f"worker-{host:03d}.log").read_text()

    def pid(self, host: int, name: str = "pid") -> int:
        """The number a command wrote into its host's home."""
        path = self.home(host) / "dalle-torch" / name
        wait_for(lambda: path.exists() and path.read_text().strip(), f"host {host} writing {name}")
        return int(path.read_text())

    def close(self) -> None:
        for process in self.launched:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for record in self.root.glob("host-*/dalle-torch/*pid"):
            text = record.read_text().strip()
            if text and alive(int(text)):
                os.kill(int(text), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    cloud.close()
