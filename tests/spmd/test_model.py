"""A DalleBart on meshes: the logits, losses and gradients of one device, parameters that stay where they are put."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.spmd.model_on_meshes import MESHES, STEPS, descend, make_batch, make_model, specs_of
from tests.spmd.on_devices import run_on_devices

NAMES = [f"{dp}x{mp}" for dp, mp in MESHES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_devices("model_on_meshes", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def on_one_device() -> tuple[list[float], dict[str, Tensor]]:
    model, losses, tensors = make_model(), [], {}
    for step in range(STEPS):
        output = model(**make_batch())
        output.loss.backward()
        descend(model)
        losses.append(output.loss.item())
        if step == 0:
            tensors["logits"] = output.logits.detach()
            tensors |= {f"{name}.grad": value.grad for name, value in model.named_parameters()}
        model.zero_grad()
    return losses, tensors | {name: value.detach() for name, value in model.named_parameters()}


def report(folder: Path, mesh: str) -> dict[str, Any]:
    return json.loads((folder / f"{mesh}.json").read_text(encoding="utf-8"))


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_a_mesh_computes_what_one_device_does(folder: Path, on_one_device: Any, mesh: str) -> None:
    losses, tensors = on_one_device
    found = load_file(folder / f"{mesh}.safetensors")
    assert found.keys() == tensors.keys()
    # float32 in another order and with another exp, three parts deep: 4e-6 of a tensor's largest value was seen.
    assert report(folder, mesh)["losses"] == pytest.approx(losses, rel=1e-6)
    for name, value in tensors.items():
        # A key's bias moves all scores of a query alike, so its gradient is nothing but rounding, of some 1e-8.
        bound = 1e-5 * value.abs().max().item() + 1e-7
        assert (found[name] - value).abs().max().item() <= bound, name


@pytest.mark.xla
@pytest.mark.parametrize(("dp", "mp"), MESHES)
def test_parameters_and_gradients_keep_their_layout(folder: Path, dp: int, mp: int) -> None:
    seen = report(folder, f"{dp}x{mp}")
    specs = specs_of(make_model(), {"dp": dp, "mp": mp})
    full, last = [-(-35 // mp), 16], [35 - (mp - 1) * -(-35 // mp), 16]
    assert sorted(seen["parts"]) == sorted(dp * ([full] * (mp - 1) + [last]))
    first = {("mp", None): f"{{devices=[{mp},1", (None, "mp"): f"{{devices=[1,{mp}", (None,): "{replicated}"}
    assert len(seen["layouts"]) == 2 * STEPS
    for layouts in seen["layouts"]:
        assert layouts.keys() == specs.keys()
        for name, layout in layouts.items():
            assert layout.startswith(first[specs[name]] if mp > 1 else "{replicated}"), (name, layout)


@pytest.mark.xla
@pytest.mark.parametrize("mesh", NAMES)
def test_there_is_one_graph(folder: Path, mesh: str) -> None:
    assert report(folder, mesh)["compilations"] == [1] + [0] * (STEPS - 1)


@pytest.mark.xla
def test_the_plan_and_a_layout_that_is_not_as_planned_are_told(folder: Path) -> None:
    seen = report(folder, "2x4")
    assert seen["plan"] == "dp 2 x mp 4 = 8 devices (1 hosts x 8, 2 mp groups a host)"
    assert "\n" not in seen["complaint"]
    for words in ("lm_head.weight lies as {devices=[4,1,2]", "encoder.final_norm.bias lies as {replicated}, not as"):
        assert words in seen["complaint"]
    assert seen["complaint"].count(" lies as ") == 2
