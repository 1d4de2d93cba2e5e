"""Two plans beside each other."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dalle_torch.studies.pod_plan.guard import differences, read_plan


def _collective(times: int, layer: str = "decoder forward", shape: str = "f32[8,16]") -> dict[str, Any]:
    return {"kind": "all-reduce", "axis": "mp", "layer": layer, "shape": shape, "times": times, "bytes": 512}


def _plan() -> dict[str, Any]:
    steps = [
        {"kind": kind, "memory": {"peak": 1000}, "collectives": [_collective(3), _collective(2, shape="f32[4]")]}
        for kind in ("with roots", "without roots")
    ]
    return {"topology": {"name": "v3-256"}, "steps": steps}


def test_equal_plans_have_no_differences_however_their_lists_lie() -> None:
    turned = _plan()
    turned["steps"][0]["collectives"].reverse()
    assert differences(_plan(), turned) == []


def test_what_changed_is_named_with_both_values() -> None:
    now = copy.deepcopy(_plan())
    now["topology"]["name"] = "v3-512"
    now["steps"][1]["memory"]["peak"] = 1100
    now["steps"][1]["collectives"] = [_collective(6), _collective(1, layer="optimizer")]
    assert differences(_plan(), now) == [
        "topology: v3-256 before, v3-512 now",
        "step without roots: bytes at its peak: 1000 before, 1100 now (+10.0%)",
        "step without roots: times of all-reduce over mp, f32[4], decoder forward: 2 before, 0 now",
        "step without roots: times of all-reduce over mp, f32[8,16], decoder forward: 3 before, 6 now (+100.0%)",
        "step without roots: times of all-reduce over mp, f32[8,16], optimizer: 0 before, 1 now",
    ]


def test_a_kind_of_step_that_only_one_has_is_named() -> None:
    now = _plan()
    del now["steps"][0]
    assert differences(_plan(), now) == ["step with roots: only before"]


def test_a_step_that_no_longer_fits_is_a_difference() -> None:
    now = _plan()
    now["steps"][0] |= {"memory": {}, "collectives": []}
    assert differences(_plan(), now)[0] == "step with roots: bytes at its peak: 1000 before, 0 now"


def test_a_plan_is_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(_plan()), encoding="utf-8")
    assert read_plan(tmp_path / "plan.json") == _plan()
    for text in ("{", "[]", '{"steps": [{"kind": "x"}]}'):
        (tmp_path / "other.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="other.json is not a plan.json"):
            read_plan(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no plan at .*none.json to compare with: No such file"):
        read_plan(tmp_path / "none.json")
