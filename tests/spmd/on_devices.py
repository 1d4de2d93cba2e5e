"""Starts the scripts of this folder on eight virtual devices of the CPU: SPMD mode is for all of a process."""

import os
import subprocess
import sys
from pathlib import Path

import dalle_torch

ROOT = Path(dalle_torch.__file__).parent.parent
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Of XLA: code that is run a few times is not worth optimising."""


def run_on_devices(script: str, folder: Path, *, flags: str = UNOPTIMIZED) -> Path:
    """Run `tests.spmd.SCRIPT FOLDER` to its end; returns `folder`, with what the script has left there."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.spmd.{script}", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder
