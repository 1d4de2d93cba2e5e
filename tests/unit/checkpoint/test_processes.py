"""Several processes save one checkpoint, one process reads it, and the other way round."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dalle_torch
from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.checkpoint.writing import share_out
from tests.unit.checkpoint.states import equal, state

ROOT = Path(dalle_torch.__file__).parent.parent
SHAPES = {
    "0.weight": (7, 5), "0.bias": (7,), "1.weight": (1, 7), "1.bias": (1,), "2.weight": (4, 1),
}  # fmt: skip


def state_of_one() -> dict[str, Tensor]:
    """What the two processes have, other numbers."""
    generator = torch.Generator().manual_seed(5)
    found = {f"model/{name}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name, shape in SHAPES.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"optimizer/{name}/{kind}"] = torch.randn(shape, generator=generator)
        found[f"optimizer/{name}/step"] = torch.tensor(9.0)
    return found | {"model/replicated": torch.randn(6, generator=generator)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    CheckpointFolder(str(place / "one")).save(3, state_of_one(), {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.unit.checkpoint.processes", str(place)]
    started = [
        subprocess.Popen(
            words, cwd=ROOT, env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)[-6000:]
    return place


def seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8"))


def test_what_two_processes_hold_in_parts_one_reads_whole(folder: Path) -> None:
    checkpoints = CheckpointFolder(str(folder / "spread"))
    assert checkpoints.steps() == [10, 20]
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    expected = load_file(folder / "spread.safetensors")
    assert len(expected) == 5 + 15 + 1
    assert equal(checkpoint.read(), expected)
    into = {name: torch.full_like(value, 7) for name, value in expected.items()}
    checkpoint.load(into)
    assert equal(into, expected)
    assert checkpoint.meta == {"rank": 0}
    assert checkpoint.host_metas == [{"rank": 0}, {"rank": 1}] == seen(folder, 0)["hosts"]
    for step in ("step-00000010", "step-00000020"):
        parts = [json.loads((folder / "spread" / step / f"host-0000{rank}.json").read_text()) for rank in range(2)]
        names = [{name for name, *_ in host["parts"]} for host in parts]
        assert names[0] == set(expected)
        # A tensor of one row leaves the second process nothing.
        assert names[1] == {name for name, value in expected.items() if value.dim() and len(value) > 1} - {
            "model/replicated"
        }


def test_what_one_process_has_saved_two_read_in_parts(folder: Path) -> None:
    assert equal(load_file(folder / "loaded.safetensors"), state_of_one())


def test_of_copies_process_0_writes_one(folder: Path) -> None:
    place = folder / "copies" / "step-00000001"
    assert sorted(path.name for path in place.glob("*.distcp")) == ["__0_0.distcp"]
    checkpoint = CheckpointFolder(str(folder / "copies")).newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), state(1))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_in_one_process_fails_in_all(folder: Path, failing: int, asynchronous: bool) -> None:
    name = f"{failing}-{asynchronous}"
    for rank in range(2):
        message = seen(folder, rank)[name]
        assert "the checkpoint of step 2 could not be written" in message
        if rank == failing:
            assert "(No space left on device)" in message
        elif not asynchronous:
            # A thread of the other process may also have found the folder gone.
            assert f"process {failing} of 2: No space left on device" in message
    assert sorted(path.name for path in (folder / f"full-{name}").iterdir()) == ["step-00000001", "step-00000002"]


def test_processes_that_differ_are_refused_in_all(folder: Path) -> None:
    for rank in range(2):
        assert "processes have other shapes or dtypes of a: nothing is saved" in seen(folder, rank)["differ"]
    assert "a checkpoint holds tensors, and these are none: a" in seen(folder, 0)["odd"]
    assert "process 0 of 2: a checkpoint holds tensors" in seen(folder, 1)["odd"]
    assert list((folder / "differ").iterdir()) == []


def test_parts_that_several_hold_are_shared_out() -> None:
    held = [[("a", (0,), 4), ("b", (0,), 4), ("c", (0,), 8)], [("a", (0,), 4), ("b", (0,), 4), ("d", (4,), 1)]]
    shares = share_out(held)
    assert shares == [{("a", (0,)), ("c", (0,))}, {("b", (0,)), ("d", (4,))}]
