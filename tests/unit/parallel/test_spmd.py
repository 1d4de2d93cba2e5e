"""Off torch_xla, laying out changes nothing and loads nothing; on a pod, hosts agree on the order of devices."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dalle_torch.config import MeshConfig
from dalle_torch.parallel.mesh import MeshPlan
from dalle_torch.parallel.rules import Spec
from dalle_torch.parallel.shampoo import ShampooSharding
from dalle_torch.parallel.spmd import check_layout, mark, mark_gradients, place, spec_lookup, start_mesh

SPECS: dict[str, Spec] = {"weight": ("mp", None), "bias": (None,)}


def test_it_is_the_identity() -> None:
    model = nn.Linear(4, 3)
    parameters, values = list(model.parameters()), model.weight.detach().clone()
    assert place(model, torch.device("cpu"), None, SPECS) is model
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    model(torch.ones(2, 4)).sum().backward()
    gradient = model.weight.grad
    mark_gradients(model, None, SPECS)
    check_layout(model, None, SPECS)
    assert model.weight.grad is gradient
    assert torch.equal(model.weight, values)
    tensor = torch.ones(2)
    assert mark(tensor, None, ("mp",)) is tensor


def test_a_model_goes_to_its_device() -> None:
    assert place(nn.Linear(4, 3), torch.device("meta"), None, SPECS).weight.is_meta


def test_parameters_find_their_specs() -> None:
    model = nn.Linear(4, 3)
    spec_of = spec_lookup(model, SPECS)
    assert [spec_of(parameter) for parameter in model.parameters()] == [("mp", None), (None,)]
    mesh = SimpleNamespace(axis_names=("dp", "mp"), shape=lambda: {"dp": 2, "mp": 2})
    assert ShampooSharding(mesh, spec_of).layout_of(model.weight) == ("mp", None)


def test_nothing_of_torch_xla_is_imported() -> None:
    code = (
        "import sys, torch; from torch import nn; from dalle_torch.parallel import mesh, rules, spmd; "
        "spmd.place(nn.Linear(2, 2), torch.device('cpu'), None, {}); print('torch_xla' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def second_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process as a pod's second host with four of eight devices, which are numbered row by row across hosts."""
    told: dict[str, Any] = {}

    def make(devices: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[list[list[int]], tuple[str, ...]]:
        return devices.reshape(shape).tolist(), axes

    def gather(into: list[list[int]], own: list[int]) -> None:
        told["own"] = own
        into[:] = [[0, 1, 4, 5], own]

    runtime = SimpleNamespace(
        use_spmd=lambda: told.update(spmd=True), process_count=lambda: 2, global_runtime_device_count=lambda: 8
    )
    library = SimpleNamespace(
        _xla_get_all_runtime_devices=lambda: [f"TPU:{number}" for number in range(8)],
        _xla_get_runtime_devices=lambda: ["TPU:2", "TPU:3", "TPU:6", "TPU:7"],
    )
    spmd = SimpleNamespace(Mesh=make)
    monkeypatch.setitem(sys.modules, "torch_xla", SimpleNamespace(_XLAC=library, runtime=runtime))
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    monkeypatch.setitem(sys.modules, "torch_xla.distributed", SimpleNamespace(spmd=spmd))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return told


def test_an_mp_group_lies_on_one_host_of_a_pod(second_of_two_hosts: dict[str, Any]) -> None:
    plan, mesh = start_mesh(MeshConfig(mp=4))
    assert plan == MeshPlan(8, hosts=2, devices_per_host=4, mp=4)
    assert mesh == ([[0, 1, 4, 5], [2, 3, 6, 7]], ("dp", "mp"))
    assert second_of_two_hosts == {"spmd": True, "own": [2, 3, 6, 7]}


def test_an_mp_over_two_hosts_is_refused(second_of_two_hosts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mesh.mp=8 does not divide the 4 devices of a host.*one of 1, 2, 4"):
        start_mesh(MeshConfig(mp=8))
