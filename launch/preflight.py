"""What a host has for a run, checked before 32 of them are rented for it: versions, devices, mesh, data, folders.

    python launch/preflight.py configs/train/mega-v3-256.yaml --output gs://bucket/run [--json] [--no-devices]

`xla_dist.py --preflight` runs it on every host with `--json`, and compares; alone it is a check of one machine. With
`--json` a host reports twice: before the accelerator is touched, which waits for all other hosts, and after.

Owns: finding out. Does not own: comparing hosts (`report`).
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "PREFLIGHT "
MIN_FREE_GB = 10.0
"""What caches and logs take, and torch_xla's compiled programs."""
_ROOT = Path(__file__).resolve().parents[1]


class Report:
    """Facts by name, and one line for each thing that is wrong."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.problems: list[str] = []

    def find(self, name: str, question: Callable[[], Any]) -> Any:
        """Note the answer; whatever is raised instead is a problem, and the answer None."""
        try:
            self.facts[name] = question()
        except Exception as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            known = isinstance(error, (OSError, ValueError, ImportError))
            self.problems.append(f"{name}: {reason if known else f'{type(error).__name__}: {reason}'}")
            self.facts[name] = None
        return self.facts[name]

    def line(self) -> str:
        """All of it, as `report` reads it."""
        return MARK + json.dumps({"facts": self.facts, "problems": self.problems, "time": time.time()})


def main(argv: list[str] | None = None) -> int:
    """Check this host; the exit status is 1 if something is wrong, but 0 with --json, which tells it in words."""
    parser = argparse.ArgumentParser(prog="preflight.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("config", help="the run's file, such as configs/train/mega-v3-256.yaml")
    parser.add_argument("--output", help="the run's folder or URL")
    parser.add_argument("--json", action="store_true", help="one line of JSON before and after devices are looked at")
    parser.add_argument("--no-devices", action="store_true", help="leave the accelerator alone")
    options = parser.parse_args(argv)
    report = Report()
    config = check_without_devices(report, options.config, options.output)
    if options.json:
        print(report.line(), flush=True)
    if not options.no_devices:
        check_devices(report, config)
        if options.json:
            print(report.line(), flush=True)
    if options.json:
        return 0
    for name, value in report.facts.items():
        print(f"{name:16} {value}")
    for problem in report.problems:
        print(f"problem: {problem}")
    return 1 if report.problems else 0


def check_without_devices(report: Report, path: str, output: str | None) -> dict[str, Any]:
    """Everything that needs no accelerator; returns the file's content, empty where it cannot be read."""
    report.facts["host"] = platform.node()
    report.facts["python"] = platform.python_version()
    for package in ("torch", "torch_xla", "libtpu"):
        report.facts[package] = _version(package)
    report.find("dalle_torch", _own_version)
    report.facts["commit"] = _commit()
    config: dict[str, Any] = report.find("config", lambda: _read(path)) or {}
    report.facts["config"] = digest(config) if config else None
    report.find("data", lambda: _count_shards(config))
    checkpoints = (config.get("checkpoint") or {}).get("folder") if config else None
    for name, folder in (("output", output), ("checkpoints", checkpoints)):
        if folder:
            report.find(name, functools.partial(_probe, str(folder)))
    free = report.find("free_gb", lambda: round(shutil.disk_usage(Path.home()).free / 1e9, 1))
    if free is not None and free < MIN_FREE_GB:
        report.problems.append(f"free_gb: {free} GB are free in {Path.home()}, and {MIN_FREE_GB:g} are needed")
    return config


def check_devices(report: Report, config: dict[str, Any]) -> None:
    """The accelerator, seen by this process together with those of all other hosts, and whether the mesh fits it."""
    found = report.find("devices", _devices)
    if found is None:
        return
    del report.facts["devices"]
    report.facts.update(found)
    world = os.environ.get("WORLD_SIZE")
    if world is not None and int(world) != found["processes"]:
        report.problems.append(
            f"processes: torch_xla counts {found['processes']}, and {world} hosts were started: hosts of the slice do "
            f"not find each other"
        )
    if config:
        report.find("mesh", lambda: _mesh(config, found))


def digest(config: dict[str, Any]) -> str:
    """Of what the file says, whatever its layout and comments: the first 12 digits of a sha256."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    import dalle_torch

    return dalle_torch.__version__


def _commit() -> str | None:
    """Of the tree that this file lies in: as `setup.sh` wrote it down, else as git has it."""
    try:
        return (_ROOT / ".commit").read_text().strip()
    except OSError:
        pass
    words = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: str) -> dict[str, Any]:
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there (this is {Path.cwd()})")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} has no sections: mesh, data and others")
    return config


def _section(cls: type, config: dict[str, Any], name: str) -> Any:
    try:
        return cls(**(config.get(name) or {}))
    except TypeError as error:
        raise ValueError(f"section {name}: {error}") from error


def _count_shards(config: dict[str, Any]) -> str | None:
    from dalle_torch.config import DataConfig
    from dalle_torch.data.shards import find_shards

    data = _section(DataConfig, config, "data")
    if not data.train:
        return None
    counts = {"train": len(find_shards(data.train))}
    counts.update({name: len(find_shards(patterns)) for name, patterns in data.evaluation.items()})
    return ", ".join(f"{name} {count}" for name, count in counts.items()) + " shards"


def _probe(folder: str) -> str:
    """Write a small file and remove it, as a checkpoint would be written."""
    from dalle_torch.data.shards import file_system, readable

    fs, path = file_system(folder)
    probe = f"{path.rstrip('/')}/.preflight-{uuid.uuid4().hex}"
    with readable(folder, action="written"):
        fs.makedirs(path, exist_ok=True)
        with fs.open(probe, "wb") as file:
            file.write(b"probe")
        fs.rm_file(probe)
    return "writable"


def _devices() -> dict[str, int]:
    os.environ.setdefault("PJRT_DEVICE", "TPU")
    import torch_xla.runtime as xr

    # Before anything else of torch_xla: single devices cannot be had back as parts of a mesh.
    xr.use_spmd()
    return {
        "local_devices": xr.addressable_runtime_device_count(),
        "devices": xr.global_runtime_device_count(),
        "process": xr.process_index(),
        "processes": xr.process_count(),
    }


def _mesh(config: dict[str, Any], found: dict[str, int]) -> str:
    from dalle_torch.config import MeshConfig
    from dalle_torch.parallel.mesh import plan_mesh

    mesh = _section(MeshConfig, config, "mesh")
    return str(plan_mesh(mesh, found["devices"], found["processes"], found["local_devices"]))


if __name__ == "__main__":
    sys.path[0] = str(_ROOT)
    sys.exit(main())
