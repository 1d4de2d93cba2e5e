"""Checkpoints go from any mesh to any other, to a plain process and back, with every tensor in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.optim import DistributedShampoo
from tests.spmd.checkpoints_on_meshes import LAYOUT, MESHES, sliced, stacks_of, state_of
from tests.spmd.on_devices import run_on_devices
from tests.spmd.shampoo_on_meshes import SETTINGS, start
from tests.unit.checkpoint.states import equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoints")
    CheckpointFolder(str(place / "from-one")).save(1, state_of(2), {})
    save_file(state_of(2), place / "from-one.safetensors")
    return run_on_devices("checkpoints_on_meshes", place)


def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text(encoding="utf-8"))


@pytest.mark.xla
def test_no_tensor_is_lost(folder: Path) -> None:
    assert seen(folder)["names"] == sorted(LAYOUT)


@pytest.mark.xla
@pytest.mark.parametrize("source", ["from-mesh", "from-one"])
@pytest.mark.parametrize("mesh", [f"{dp}x{mp}" for dp, mp in MESHES])
def test_a_mesh_gets_what_was_saved_elsewhere(folder: Path, source: str, mesh: str) -> None:
    assert seen(folder)["differ"][f"{source} {mesh}"] == []
    assert seen(folder)["moved"][f"{source} {mesh}"] == []


@pytest.mark.xla
def test_a_plain_process_gets_what_a_mesh_saved(folder: Path) -> None:
    expected = load_file(folder / "from-mesh.safetensors")
    checkpoints = CheckpointFolder(str(folder / "from-mesh"), keep=9)
    assert checkpoints.steps() == [1, 2]
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), expected)
    for dp, mp in MESHES:
        back = CheckpointFolder(str(folder / f"back-{dp}x{mp}")).newest()
        assert back is not None
        assert equal(back.read(), state_of(2))


@pytest.mark.xla
def test_stacks_are_saved_as_they_lie(folder: Path) -> None:
    shampoo = seen(folder)["shampoo"]
    assert shampoo["compiled"] == 0
    assert {"momentum", "statistics.0.0", "preconditioners.0.1"} <= set(shampoo["split"])
    assert shampoo["differ"] == {f"{dp}x{mp}": [] for dp, mp in MESHES}


@pytest.mark.xla
def test_a_plain_process_gets_the_stacks_of_a_mesh(folder: Path) -> None:
    expected = load_file(folder / "shampoo.safetensors")
    assert any(value.is_floating_point() and value.any() for value in expected.values())
    parameters = {name: nn.Parameter(torch.zeros_like(value)) for name, value in start().items()}
    optimizer = DistributedShampoo(parameters.items(), **SETTINGS)
    optimizer.prepare()
    checkpoints = CheckpointFolder(str(folder / "shampoo"))
    for step in checkpoints.steps():
        checkpoints.open(step).load(parameters, stacks_of(optimizer))
        assert equal(sliced(stacks_of(optimizer)), expected)
    assert checkpoints.steps() == [1, 2]


@pytest.mark.xla
def test_each_part_is_written_once(folder: Path) -> None:
    for place in folder.glob("*/step-*"):
        parts = json.loads((place / "host-00000.json").read_text())["parts"]
        keys = [(name, tuple(offsets)) for name, offsets, *_ in parts]
        assert len(keys) == len(set(keys))
