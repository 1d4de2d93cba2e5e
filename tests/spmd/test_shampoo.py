"""Distributed Shampoo on meshes: the parameters of one device, state that stays split, two graphs."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from dalle_torch.optim import DistributedShampoo
from tests.spmd.on_devices import run_on_devices
from tests.spmd.shampoo_on_meshes import (
    CHANGES,
    LATE,
    MESHES,
    SELDOM,
    SETTINGS,
    STEPS,
    change,
    give_gradients,
    start,
)

NAMES = [f"{dp}x{mp}" for dp, mp in MESHES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_devices("shampoo_on_meshes", tmp_path_factory.mktemp("shampoo"))


@pytest.fixture(scope="module")
def on_one_device() -> tuple[dict[str, nn.Parameter], DistributedShampoo]:
    named = {name: nn.Parameter(value) for name, value in start().items()}
    optimizer = DistributedShampoo(named.items(), **SETTINGS)
    for step in range(STEPS):
        give_gradients(named, optimizer, step)
        optimizer.step()
    return named, optimizer


def report(folder: Path, mesh: str) -> dict[str, Any]:
    return json.loads((folder / f"{mesh}.json").read_text(encoding="utf-8"))


@pytest.mark.xla
@pytest.mark.parametrize("run", [*NAMES, "resumed"])
def test_a_mesh_trains_as_one_device_does(folder: Path, on_one_device: Any, run: str) -> None:
    named, optimizer = on_one_device
    found, before = load_file(folder / f"{run}.safetensors"), start()
    for name, parameter in named.items():
        value = parameter.detach()
        # float32 in another order, magnified by roots of nearly singular matrices.
        assert (found[name] - value).norm() <= 1e-3 * (value - before[name]).norm(), name
    if run != "resumed":
        # One matrix of few gradients has no root yet, here as there.
        failures = {name: int(optimizer.state[parameter]["root_failures"]) for name, parameter in named.items()}
        assert report(folder, run)["failures"] == failures


@pytest.mark.xla
def test_statistics_may_be_taken_more_seldom_than_roots(folder: Path) -> None:
    named = {name: nn.Parameter(value) for name, value in start().items()}
    optimizer = DistributedShampoo(named.items(), **SETTINGS | SELDOM)
    for step in range(STEPS):
        give_gradients(named, optimizer, step)
        optimizer.step()
    found, before = load_file(folder / "seldom.safetensors"), start()
    for name, parameter in named.items():
        value = parameter.detach()
        # As above.
        assert (found[name] - value).norm() <= 1e-3 * (value - before[name]).norm(), name


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_matrices_stay_split_over_all_devices_and_momenta_as_the_parameters(folder: Path, mesh: str) -> None:
    mp = int(mesh.split("x")[1])
    for step in report(folder, mesh)["steps"]:
        matrices = {name: spec for name, spec in step["specs"].items() if ".0." in name or ".1." in name}
        assert len(matrices) == 2 * (2 + 4 + 1)
        assert set(matrices.values()) == {"{devices=[8,1,1]0,1,2,3,4,5,6,7}"}
        momenta = [spec for name, spec in step["specs"].items() if name.split("/")[1] == "momentum"]
        if mp > 1:
            # Two shapes are split, two are not.
            assert sum(spec.startswith(f"{{devices=[1,{mp},1") for spec in momenta) == 2
            split = [spec for spec in step["parameter_specs"].values() if spec.startswith(f"{{devices=[{mp},1")]
            assert len(split) == 3


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_roots_are_taken_on_every_core(folder: Path, mesh: str) -> None:
    assert report(folder, mesh)["root_specs"] == ["{devices=[8,1,1]0,1,2,3,4,5,6,7}"]


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_there_are_two_graphs_and_nothing_is_read_in_a_step(folder: Path, mesh: str) -> None:
    steps = report(folder, mesh)["steps"]
    assert [step["roots"] for step in steps] == [step % 3 == 0 for step in range(STEPS)]
    # The learning rate and the start of preconditioning change later on, and are no other graph.
    assert [step["compilations"] for step in steps] == [1, 1] + [0] * (STEPS - 2)
    assert [step["compile_times"] for step in steps][2:] == [0] * (STEPS - 2)
    assert [step["reads"] for step in steps] == [0] * STEPS
    assert all(step["fallbacks"] == [] for step in steps)


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_settings_that_change_between_steps_are_no_other_program(folder: Path, mesh: str) -> None:
    named = {name: nn.Parameter(value) for name, value in start().items()}
    optimizer = DistributedShampoo(named.items(), **SETTINGS | LATE)
    roots = []
    for step, changes in enumerate(CHANGES):
        give_gradients(named, optimizer, step)
        change(optimizer, changes)
        roots.append(optimizer.roots_due or step == 0)
        optimizer.step()
    steps = report(folder, f"changed-{mesh}")["steps"]
    assert [step["roots"] for step in steps] == roots
    assert roots[5:] == [False, True, False, True, False, True]
    # Both programs were seen in the first run on this mesh.
    assert [(step["compilations"], step["compile_times"]) for step in steps] == [(0, 0)] * len(CHANGES)
    assert [step["reads"] for step in steps] == [0] * len(CHANGES)
    found, before = load_file(folder / f"changed-{mesh}.safetensors"), start()
    for name, parameter in named.items():
        value = parameter.detach()
        # As above.
        assert (found[name] - value).norm() <= 1e-3 * (value - before[name]).norm(), name


def test_another_mesh_is_refused() -> None:
    from dalle_torch.parallel.shampoo import ShampooSharding

    class Mesh:
        axis_names = ("data", "model")

    with pytest.raises(ValueError, match="the mesh has the axes data, model: give one of dp, mp"):
        ShampooSharding(Mesh())
