"""Plans in words: what fits, what does not, what would help."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dalle_torch.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from dalle_torch.parallel.mesh import AXES, BatchPlan, MeshPlan
from dalle_torch.parallel.trace import TracedInput
from dalle_torch.studies.pod_plan.chips import CHIPS, GIB, find_topology
from dalle_torch.studies.pod_plan.collectives import find_collectives
from dalle_torch.studies.pod_plan.hlo import parse
from dalle_torch.studies.pod_plan.memory import advice, bytes_of, inputs_by_kind, read_message
from dalle_torch.studies.pod_plan.plan import PodPlan, StepPlan
from dalle_torch.studies.pod_plan.report import as_text, compare_text, write_plan
from dalle_torch.studies.pod_plan.roofline import estimate
from dalle_torch.studies.pod_plan.steps import PLAIN, WITH_ROOTS
from dalle_torch.studies.pod_plan.work import Work, count_work
from tests.unit.studies.pod_plan.program import TEXT

MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (19.46G) exceeds available HBM (15.48G). HLO module: IrToHlo.1."
)


def step(kind: str) -> StepPlan:
    program = parse(TEXT)
    collectives = find_collectives(program, {device: divmod(device, 4) for device in range(8)}, AXES)
    work = count_work(program)
    memory = {"argument": GIB, "temp": 2 * GIB, "generated_code": 0, "peak": 3 * GIB}
    guess = estimate(work, collectives, CHIPS["v3"])
    return StepPlan(kind, {"weights": GIB}, memory, 12.0, GIB, work, tuple(collectives), guess)


def too_large(kind: str) -> StepPlan:
    needed, available, largest = read_message(MESSAGE)
    return StepPlan(
        kind, {"weights": GIB}, {}, 12.0, GIB, needed=needed, available=available, largest=tuple(largest),
        advice=("training.use_scan=true",),
    )  # fmt: skip


def plan(*steps: StepPlan) -> PodPlan:
    mesh = MeshPlan(8, 1, 8, 4)
    return PodPlan(find_topology("v3-8"), mesh, BatchPlan(mesh, 8, 3), 1e12, steps, 10 if len(steps) > 1 else 0)


def test_estimates_go_by_the_published_rates() -> None:
    guess = estimate(Work(1e12, 61.5e12, 450e9), (), CHIPS["v3"])
    assert (guess.arithmetic, guess.memory, guess.links) == (1.0, 1.0, 0.0)
    assert (guess.least, guess.most, guess.limit) == (1.0, 2.0, "arithmetic")


def test_the_mean_step_has_roots_in_one_of_ten() -> None:
    slow, fast = step(WITH_ROOTS), step(PLAIN)
    mean = plan(slow, fast).estimate
    assert mean is not None and fast.estimate is not None
    assert mean.memory == pytest.approx(fast.estimate.memory)
    one = plan(fast)
    assert one.utilisation(2.0) == 1e12 / (2.0 * 8 * 61.5e12)


def test_the_table_names_what_is_an_estimate_and_the_chip(tmp_path: Path) -> None:
    text = as_text(plan(step(WITH_ROOTS), step(PLAIN)))
    for words in (
        "v3-8",
        "123 TFLOP/s",
        "peak",
        "3.000",
        "16.000",
        "encoder forward aten__mm",
        "(estimate",
        "one in 10",
    ):
        assert words in text, words
    write_plan(plan(step(PLAIN)), tmp_path)
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "encoder forward aten__mm" in page and "<script" not in page
    saved = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert saved["steps"][0]["memory"]["peak"] == 3 * GIB
    assert saved["steps"][0]["collectives"][0]["axis"] == "mp"
    assert saved["topology"]["of_libtpu"] == "v3:2x2"


def test_a_step_that_does_not_fit_is_a_result() -> None:
    text = as_text(plan(too_large(WITH_ROOTS), step(PLAIN)))
    assert "no, 19.46G of 15.48G" in text
    assert "would help: training.use_scan=true" in text
    assert plan(too_large(PLAIN)).estimate is None
    json.dumps(plan(too_large(PLAIN)).to_dict())


def test_of_a_program_that_cannot_be_read_the_memory_is_told() -> None:
    unread = replace(step(PLAIN), work=None, collectives=(), estimate=None, unread="no words for async-update")
    text = as_text(plan(unread))
    assert "3.000" in text and "cannot be read here (no words for async-update)" in text
    assert "collectives of a step" not in text
    assert plan(unread).fits and plan(unread).estimate is None
    beside = compare_text([("mesh=2x4", plan(step(PLAIN))), ("mesh=1x8", plan(unread))]).splitlines()[2]
    assert beside.split()[:5] == ["mesh=1x8", "yes", "3.000", "1.000", "2.000"]


def test_variants_stand_beside_each_other() -> None:
    text = compare_text(
        [("mesh=2x4", plan(step(PLAIN))), ("mesh=1x8", plan(too_large(PLAIN))), ("mesh=3x3", "the mesh does not fit")]
    )
    lines = text.splitlines()
    assert "yes" in lines[1] and "no: needs 19.46G" in lines[2] and "cannot be: the mesh does not fit" in lines[3]


def test_another_message_of_the_compiler_names_the_largest_tensors() -> None:
    message = (
        "Ran out of memory in memory space hbm. Used 33.90G of 15.48G hbm.\n  1. Size: 2.00G\n     Operator: "
        'op_type="aten__add" op_name="decoder/aten__add"\n     Shape: f32[24,44,256,2048]{3,2,1,0}\n'
        "     Unpadded size: 2.00G\n"
    )
    assert read_message(message) == ("33.90G", "15.48G", ["2.00G f32[24,44,256,2048] of decoder/aten__add"])
    assert read_message("RESOURCE_EXHAUSTED") == ("more than there is", "", [])


def test_advice_is_of_settings_that_are_not_on_yet() -> None:
    training = TrainingConfig(steps=1, batch_size=8, gradient_checkpointing=True, use_scan=True, precision="bfloat16")
    config = RunConfig(
        model=ModelConfig(config="x"), data=DataConfig(train=["x"]), training=training, mesh=MeshConfig(dp=2, mp=4),
        optimizer=OptimizerConfig(name="shampoo"),
    )  # fmt: skip
    momentum = TracedInput("momentum of 1 x [8, 8] (0)", (1, 8, 8), "float32", "{devices=[1,4,1,2]0 last}", 3)
    found = " ".join(advice(config, [momentum]))
    assert "training.batch_size=4 with training.accumulation_steps=2" in found
    assert "mesh.mp=8" in found and "8 bits" in found
    assert "use_scan" not in found and "gradient_checkpointing" not in found and "precision" not in found
    # Rows of a copy of the model are whole numbers: 3 of each of the two.
    odd = replace(config, training=replace(training, batch_size=6))
    assert "training.batch_size=2 with training.accumulation_steps=3 has 1/3" in advice(odd, [momentum])[0]


def test_bytes_of_an_input_are_those_of_a_device() -> None:
    whole = TracedInput("x", (3, 5), "bfloat16", "{replicated}", None)
    split = TracedInput("statistics.0.0 of 4 x [8] (1)", (256, 64, 64), "float32", "{devices=[32,1,1,8]0,1 last}", None)
    assert (bytes_of(whole), bytes_of(split)) == (30, 8 * 64 * 64 * 4)
    assert inputs_by_kind([whole, split]) == {"statistics": 8 * 64 * 64 * 4, "weights": 30}
