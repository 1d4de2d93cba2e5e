"""The loop: a run in two halves equals one in a piece, Ctrl-C leaves a checkpoint, and every metric is on file."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle_torch.config import OptimizerConfig, PlateauConfig, ShampooConfig, TrainingConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.saving import state_tensors
from dalle_torch.optim.schedules import PlateauState
from dalle_torch.storage import CheckpointError
from dalle_torch.training.loop import train
from dalle_torch.training.state import checkpoints

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2)
CONFIG = TrainingConfig(steps=6, batch_size=8, log_every=2, eval_every=3, save_every=2, keep=2)


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _interrupt_at(batches, index: int):
    def source(i: int):
        if i == index:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(i)

    return source


def _constant_loss(state) -> dict[str, float]:
    return {"eval_loss": 1.0}


SHAMPOO = ShampooConfig(block_size=8, start_preconditioning_step=2, preconditioning_compute_steps=2)


@pytest.mark.parametrize(
    "optimizer",
    [
        OPTIMIZER,
        OptimizerConfig(
            lr=1e-2, warmup_steps=1, weight_decay=0.1, schedule="plateau", plateau=PlateauConfig(patience=0)
        ),
        OptimizerConfig(name="adafactor", lr=1e-2, warmup_steps=2, weight_decay=0.1),
        OptimizerConfig(name="shampoo", lr=1e-2, warmup_steps=2, weight_decay=0.1, shampoo=SHAMPOO),
        OptimizerConfig(
            name="shampoo",
            lr=1e-2,
            warmup_steps=1,
            schedule="plateau",
            plateau=PlateauConfig(patience=1),
            shampoo=replace(SHAMPOO, best_effort_memory_usage_reduction=True),
        ),
    ],
    ids=lambda config: f"{config.name}-{config.schedule}",
)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    make_state, batches, tmp_path: Path, optimizer: OptimizerConfig, stop: int
) -> None:
    config = replace(CONFIG, eval_every=1, log_every=1)
    whole = train(make_state(optimizer), batches, optimizer, config, tmp_path / "whole", _constant_loss)
    halved = _interrupt_at(batches, stop)
    halted = train(make_state(optimizer), halved, optimizer, config, tmp_path / "halves", _constant_loss)
    assert halted.step == stop + 1
    resumed = train(make_state(optimizer), batches, optimizer, config, tmp_path / "halves", _constant_loss)
    assert resumed.step == whole.step == 6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0)
    expected, found = state_tensors(whole.optimizer), state_tensors(resumed.optimizer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert resumed.plateau == whole.plateau
    rates = [[row["lr"] for row in _rows(tmp_path / run) if "lr" in row] for run in ("whole", "halves")]
    assert rates[0] == rates[1]
    if optimizer.schedule == "plateau":
        assert whole.plateau.reductions > 0 and rates[0][-1] < max(rates[0])


@pytest.mark.parametrize("evaluate", [None, lambda state: {"accuracy": 1.0}])
def test_a_plateau_without_a_loss_to_go_by_is_refused(make_state, batches, tmp_path: Path, evaluate) -> None:
    optimizer = OptimizerConfig(schedule="plateau", warmup_steps=0)
    with pytest.raises(ValueError, match="schedule=plateau needs e"):
        train(make_state(), batches, optimizer, CONFIG, tmp_path, evaluate)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (OptimizerConfig(), OptimizerConfig(name="adafactor"), "the optimizer is AdamW in it and Adafactor here"),
        (OptimizerConfig(name="shampoo"), OptimizerConfig(), "optimizer is DistributedShampoo in it and AdamW"),
        (
            OptimizerConfig(name="shampoo", shampoo=SHAMPOO, weight_decay=0.1),
            OptimizerConfig(name="shampoo", eps=0.5, beta1=0.5, weight_decay=0.2),
            "optimizer block_size is 8 in it and 1024 here",
        ),
    ],
    ids=["adafactor", "adamw", "settings"],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    make_state, batches, tmp_path: Path, before: OptimizerConfig, after: OptimizerConfig, reason: str
) -> None:
    train(make_state(before), batches, before, replace(CONFIG, steps=1), tmp_path)
    state = make_state(after)
    with pytest.raises(CheckpointError) as caught:
        train(state, batches, after, CONFIG, tmp_path)
    assert reason in str(caught.value) and "exp_avg" not in str(caught.value)
    assert state.step == 0 and not state_tensors(state.optimizer)
    if "block_size" in reason:
        assert "optimizer diagonal_epsilon is 1e-10 in it and 0.5 here" in str(caught.value)
        assert str(caught.value).count("block_size") == 1
        assert not any(name in str(caught.value) for name in ("weight_decay", "beta1"))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "shampoo"])
def test_tensors_of_an_optimizer_that_do_not_fit_are_all_named(make_state, batches, tmp_path: Path, name: str) -> None:
    config = OptimizerConfig(name=name)
    train(make_state(config), batches, config, replace(CONFIG, steps=1), tmp_path)
    path = tmp_path / "checkpoint-1" / "optimizer.safetensors"
    tensors = load_file(path)
    first, second, *_ = (key for key in tensors if not key.endswith("/step"))
    tensors["extra/step"] = tensors.pop(first)
    tensors[second] = torch.zeros(2, 3, 2)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        make_state(config).load(tmp_path / "checkpoint-1")
    for reason in (f"{first} is missing", "extra/step is unknown", f"{second} has shape [2, 3, 2]"):
        assert f"optimizer {reason}" in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "shampoo"])
def test_weight_decay_can_change_between_checkpoint_and_run(make_state, batches, tmp_path: Path, name: str) -> None:
    before, after = (OptimizerConfig(name=name, weight_decay=decay) for decay in (0.0, 0.5))
    trained = train(make_state(before), batches, before, replace(CONFIG, steps=2), tmp_path)
    state = make_state(after)
    state.load(tmp_path / "checkpoint-2")
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.5, 0.0]
    expected, found = state_tensors(trained.optimizer), state_tensors(state.optimizer)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_checkpoint_that_says_nothing_of_its_optimizer_is_of_adamw(make_state, batches, tmp_path: Path) -> None:
    train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path)
    (tmp_path / "checkpoint-6" / "state.json").write_text('{"step": 6}\n')
    state = make_state()
    state.load(tmp_path / "checkpoint-6")
    assert (state.step, state.plateau) == (6, PlateauState())


def test_a_checkpoint_from_before_the_first_update_loads(make_state, tmp_path: Path) -> None:
    make_state().save(tmp_path, keep=1)
    state = make_state()
    state.load(tmp_path / "checkpoint-0")
    assert state.step == 0 and not state_tensors(state.optimizer)


def test_ctrl_c_works_as_before_afterwards(make_state, batches, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(make_state(), _interrupt_at(batches, 1), OPTIMIZER, CONFIG, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_newest_checkpoints_stay_and_load(make_state, batches, tmp_path: Path) -> None:
    state = train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    loaded = DalleBart.from_pretrained(tmp_path / "checkpoint-6")
    for name, tensor in state.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert not state.model.training


def test_metrics_are_on_file(make_state, batches, tmp_path: Path) -> None:
    seen = []

    def evaluate(state) -> dict[str, float]:
        seen.append((state.step, state.model.training, torch.is_grad_enabled()))
        return {"accuracy": 0.5}

    train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path, evaluate)
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "accuracy" in row] == [3, 6]
    assert seen == [(3, False, False), (6, False, False)]
    assert all(row["lr"] > 0 and row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert rows[-2]["samples_per_second"] > 0


def test_accumulated_batches_are_all_used_once(make_state, batches, tmp_path: Path) -> None:
    used: list[int] = []

    def source(index: int):
        used.append(index)
        return batches(index)

    train(make_state(), source, OPTIMIZER, TrainingConfig(steps=3, batch_size=8, accumulation_steps=2), tmp_path)
    assert used == list(range(6))


def test_a_loss_that_is_not_a_number_ends_the_run(make_state, batches, tmp_path: Path) -> None:
    state = make_state()
    with torch.no_grad():
        state.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower optimizer.lr"):
        train(state, batches, OPTIMIZER, CONFIG, tmp_path)


def test_a_checkpoint_of_another_run_is_refused_with_all_reasons(make_state, batches, tmp_path: Path) -> None:
    train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path)
    path = tmp_path / "checkpoint-6" / "model.safetensors"
    weights = load_file(path)
    weights["extra"] = weights.pop("lm_head.weight")
    weights["decoder.embed_tokens.weight"] = torch.zeros(2, 2)
    save_file(weights, path)
    with pytest.raises(CheckpointError) as caught:
        train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path)
    for reason in ("lm_head.weight is missing", "extra is unknown", "embed_tokens.weight has shape [2, 2]"):
        assert reason in str(caught.value)
