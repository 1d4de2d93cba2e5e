"""Which kinds of steps a plan is of."""

from dataclasses import replace
from typing import Any

import pytest

from dalle_torch.config import MeshConfig, RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.studies.pod_plan import plan as module
from dalle_torch.studies.pod_plan.chips import find_topology
from dalle_torch.studies.pod_plan.plan import plan_pod
from dalle_torch.studies.pod_plan.process import Compiled


class Traced:
    program = b""
    inputs = ()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps that were compiled: none that was fits."""
    seen: list[Any] = []
    steps = {kind: Traced() for kind in ("with roots", "without roots")}
    monkeypatch.setattr(module, "hosts_of", lambda *_: [[0, 1, 4, 5], [2, 3, 6, 7]])
    monkeypatch.setattr(module, "trace_steps", lambda *_: iter(steps.items()))

    def compile_step(traced: Traced, *_: Any) -> Compiled:
        seen.extend(kind for kind, step in steps.items() if step is traced)
        return Compiled(1.0, 1, {}, {}, "", "Ran out of memory in memory space hbm. Used 20.0G of 15.48G hbm.")

    monkeypatch.setattr(module, "compile_step", compile_step)
    return seen


def plan(only: str | None) -> list[str]:
    config = load_config(RunConfig, "configs/train/mega-v3-256.yaml")
    config = replace(config, mesh=MeshConfig(dp=2, mp=4))
    network = DalleBartConfig.from_pretrained("configs/model/shapes.json", image_vocab_size=255)
    return [step.kind for step in plan_pod(config, network, find_topology("v3-8"), only=only).steps]


def test_each_kind_is_compiled_or_the_one_that_is_asked_for(compiled: list[str]) -> None:
    assert plan(None) == compiled == ["with roots", "without roots"]
    compiled.clear()
    assert plan("without roots") == compiled == ["without roots"]


def test_a_kind_that_there_is_not_is_refused(compiled: list[str]) -> None:
    with pytest.raises(ValueError, match="no step of this run is neither: it has other kinds alone"):
        plan("neither")
    assert not compiled
