"""Checkpoints go from any mesh to any other, to a plain process and back, with every tensor in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dalle_torch.checkpoint import CheckpointFolder
from tests.spmd.checkpoints_on_meshes import LAYOUT, MESHES, state_of
from tests.spmd.on_devices import run_on_devices
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
def test_each_part_is_written_once(folder: Path) -> None:
    for place in folder.glob("*/step-*"):
        parts = json.loads((place / "host-00000.json").read_text())["parts"]
        keys = [(name, tuple(offsets)) for name, offsets, *_ in parts]
        assert len(keys) == len(set(keys))
