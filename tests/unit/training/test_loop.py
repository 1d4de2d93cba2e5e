"""The loop: a run in two halves equals one in a piece, Ctrl-C leaves a checkpoint, and every metric is on file."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle_torch.config import OptimizerConfig, TrainingConfig
from dalle_torch.models.dalle_bart import DalleBart
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


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(make_state, batches, tmp_path: Path) -> None:
    whole = train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path / "whole")
    halted = train(make_state(), _interrupt_at(batches, 2), OPTIMIZER, CONFIG, tmp_path / "halves")
    assert halted.step == 3
    resumed = train(make_state(), batches, OPTIMIZER, CONFIG, tmp_path / "halves")
    assert resumed.step == whole.step == 6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0)


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
