"""A process that is killed while it saves leaves the checkpoints that it had committed, and nothing to stumble over."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dalle_torch
from dalle_torch.checkpoint import CheckpointFolder
from tests.unit.checkpoint.states import equal, state

KILLS = 12


def start(folder: Path, first: int, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.checkpoint.states", str(folder), str(first), how],
        cwd=Path(dalle_torch.__file__).parent.parent,
        env=os.environ,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_killed_at_any_moment(tmp_path: Path, how: str) -> None:
    moments = random.Random(how)
    step = 0
    for _ in range(KILLS):
        process = start(tmp_path, step + 1, how)
        assert process.stdout is not None
        committed = [int(process.stdout.readline()) for _ in range(moments.randint(1, 3))]
        # Somewhere in the next save, of some milliseconds.
        time.sleep(moments.random() * 0.05)
        process.kill()
        committed += [int(line) for line in process.stdout]
        process.wait()
        folder = CheckpointFolder(str(tmp_path))
        checkpoint = folder.newest()
        assert checkpoint is not None
        # The last one may have been committed without there having been the time to say so.
        assert committed[-1] <= checkpoint.step <= committed[-1] + 1
        assert checkpoint.meta == {"step": checkpoint.step}
        assert equal(checkpoint.read(), state(checkpoint.step))
        step = checkpoint.step
    folder.save(step + 1, state(step + 1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}" for s in folder.steps()]
    assert len(folder.steps()) == 2
