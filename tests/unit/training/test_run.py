"""A run in this process: settings adjusted on the way, schedules, refusals, what is logged."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.config import ModelConfig, RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.parallel.accelerated import AcceleratedEngine
from dalle_torch.storage import CheckpointError
from dalle_torch.training import loop, speed
from dalle_torch.training.control import Mailbox, parse_request
from dalle_torch.training.run import train_run
from dalle_torch.training.setup import model_config
from tests.tiny_run import OPTIMIZERS, run_config, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def config_of(tmp_path: Path, source: Path) -> Callable[..., RunConfig]:
    return lambda **sections: run_config(tmp_path / "run.yaml", source, **sections)


def rows(folder: Path, key: str = "loss") -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None
    return newest.read()


def same(left: Path, right: Path) -> bool:
    first, second = final(left), final(right)
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


def asking(folder: Path, config: RunConfig, requests: Mapping[int, list[str]]) -> loop.Scorer:
    """Sends requests when an evaluation takes place: they are taken up before the next update."""

    def scorer(model: object, step: int) -> dict[str, float]:
        if step in requests:
            Mailbox([str(folder / "control")]).send(parse_request(requests[step], config))
        return {"asked": float(step in requests)}

    return scorer


EVERY = {"eval_every": 1, "save_every": 1}


def test_a_setting_holds_from_the_next_update_and_again_after_a_restart(
    tmp_path: Path, config_of: Callable[..., RunConfig]
) -> None:
    config = config_of(training=EVERY | {"steps": 8}, optimizer=OPTIMIZERS["adamw"] | {"schedule": "constant"})
    whole = tmp_path / "whole"
    wanted = {3: ["learning_rate=1e-3", "blank_caption_prob=0.9", "weight_decay=0.5"], 5: ["beta1=0.5"]}
    assert train_run(config, whole, asking(whole, config, wanted)) == "finished"
    rates = rows(whole, "lr")
    assert rates[3] == 1e-2 and all(rates[step] == 1e-3 for step in range(4, 9))
    history = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert {(row["name"], row["step"], row["old"], row["new"]) for row in history} == {
        ("optimizer.lr", 3, 1e-2, 1e-3), ("data.blank_caption_prob", 3, 0.25, 0.9),
        ("optimizer.weight_decay", 3, 0.1, 0.5), ("optimizer.beta1", 5, None, 0.5),
    }  # fmt: skip

    # A run that lost everything behind step 2, and its history with it but for what was on the first machine's disk.
    broken = tmp_path / "broken"
    short = config_of(training=EVERY | {"steps": 2}, optimizer=OPTIMIZERS["adamw"] | {"schedule": "constant"})
    assert train_run(short, broken) == "finished"
    (broken / "history.jsonl").write_text((whole / "history.jsonl").read_text())
    assert train_run(config, broken) == "finished"
    assert same(broken, whole)


def test_adjusted_settings_come_back_with_a_checkpoint_alone(
    tmp_path: Path, config_of: Callable[..., RunConfig]
) -> None:
    optimizer = OPTIMIZERS["shampoo"] | {"schedule": "constant"}
    wanted = {2: ["learning_rate=1e-3", "preconditioning_compute_steps=2"]}
    config, short = (config_of(training=EVERY | {"steps": steps}, optimizer=optimizer) for steps in (7, 4))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_run(config, whole, asking(whole, config, wanted)) == "finished"
    assert train_run(short, halves, asking(halves, short, wanted)) == "finished"
    (halves / "history.jsonl").unlink()
    assert train_run(config, halves) == "finished"
    assert same(halves, whole)
    assert len((halves / "history.jsonl").read_text().splitlines()) == 2


def test_decay_that_comes_where_there_was_none_spares_norms(
    tmp_path: Path, config_of: Callable[..., RunConfig]
) -> None:
    optimizer = {"name": "adamw", "lr": 1e-3, "warmup_steps": 0, "schedule": "constant"}
    folders = {}
    for name, requests in (("with", {2: ["weight_decay=10"]}), ("without", {})):
        config = config_of(training=EVERY | {"steps": 3}, optimizer=optimizer)
        folders[name] = tmp_path / name
        assert train_run(config, folders[name], asking(folders[name], config, requests)) == "finished"
    with_decay, without = (final(folder) for folder in folders.values())
    differing = {
        name for name, value in without.items() if name.startswith("model/") and not value.equal(with_decay[name])
    }
    assert differing and all(without[name].ndim == 2 and "embed_positions" not in name for name in differing)
    # It can be taken back, and a run that is resumed keeps its groups.
    config, now = (config_of(training=EVERY | {"steps": 5}, optimizer=kind) for kind in
                   (optimizer, optimizer | {"weight_decay": 10.0}))  # fmt: skip
    assert train_run(config, folders["with"], asking(folders["with"], now, {4: ["weight_decay=0"]})) == "finished"
    assert rows(folders["with"], "new")[4] == 0
    config = config_of(training=EVERY | {"steps": 6}, optimizer=optimizer)
    assert train_run(config, folders["with"]) == "finished"


def test_save_and_stop_are_done_once(tmp_path: Path, config_of: Callable[..., RunConfig]) -> None:
    config = config_of(training={"steps": 6, "eval_every": 1, "save_every": 100}, checkpoint={"keep": 9})
    folder = tmp_path / "run"
    assert train_run(config, folder, asking(folder, config, {2: ["save"], 4: ["stop"]})) == "stopped"
    assert CheckpointFolder(str(folder / "checkpoints")).steps() == [2, 4]
    assert train_run(config, folder) == "finished"
    assert CheckpointFolder(str(folder / "checkpoints")).steps() == [2, 4, 6]


def test_a_plateau_lowers_the_rate_by_the_evaluations_loss(tmp_path: Path, config_of: Callable[..., RunConfig]) -> None:
    optimizer = {"name": "adamw", "lr": 1e-9, "warmup_steps": 0, "schedule": "plateau", "plateau": {"patience": 0}}
    assert train_run(config_of(training=EVERY | {"steps": 4}, optimizer=optimizer), tmp_path / "run") == "finished"
    assert list(rows(tmp_path / "run", "lr").values()) == [1e-9, 1e-9, 5e-10, 2.5e-10]


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(
    tmp_path: Path, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(training=EVERY)
    assert train_run(config_of(training=EVERY | {"steps": 2}), tmp_path / "run") == "finished"
    before = final(tmp_path / "run")
    monkeypatch.setattr(loop, "learning_rate", lambda *_: math.nan)
    for every, message in (
        ({"save_every": 9}, r"the loss is nan at step 4: lower .*checkpoint is of step 2"),
        # The update of step 3 spoils the weights, and the loss shows it at the next one.
        ({"save_every": 1}, r"the weights are not finite at step 3 and are not saved: .*checkpoint is of step 2"),
        ({"save_every": 2, "log_every": 9}, r"the weights are not finite at step 4 and are not saved: .* of step 2"),
    ):
        with pytest.raises(FloatingPointError, match=message):
            train_run(replace(config, training=replace(config.training, **every)), tmp_path / "run")
    after = final(tmp_path / "run")
    assert all(value.equal(after[name]) for name, value in before.items())


def test_what_is_done_is_not_saved_again(tmp_path: Path, config_of: Callable[..., RunConfig], caplog: Any) -> None:
    config = config_of(training={"steps": 2})
    assert train_run(config, tmp_path / "run") == "finished"
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert train_run(config, tmp_path / "run") == "finished"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert "step 2 is reached, and training.steps=2" in caplog.text


def test_a_damaged_copy_of_the_options_does_not_stop_a_run(
    tmp_path: Path, config_of: Callable[..., RunConfig], caplog: Any
) -> None:
    config = config_of(training={"steps": 2})
    assert train_run(config, tmp_path / "run") == "finished"
    (tmp_path / "run" / "config.yaml").write_text("model: [")
    assert train_run(config_of(training={"steps": 3}), tmp_path / "run") == "finished"
    assert "cannot be told" in caplog.text
    assert load_config(RunConfig, tmp_path / "run" / "config.yaml").training.steps == 3


@pytest.mark.parametrize("key", ["config", "weights"])
def test_the_models_configuration_is_found_where_weights_are(key: str, source: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(source / "model"), "/models/tiny", recursive=True)
    there = model_config(ModelConfig(config=str(source / "model")))
    assert model_config(ModelConfig(**{key: "memory://models/tiny"})).to_dict() == there.to_dict()
    assert model_config(ModelConfig(config=str(source / "model" / "config.json"))).to_dict() == there.to_dict()
    for gone, message in (
        ("/nope", "/nope is not a folder here, and no hub id"),
        ("/no.json", "/no.json is not there"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            model_config(ModelConfig(config=gone))


def test_what_the_device_has_yet_to_do_counts_as_training(
    tmp_path: Path, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that works only when it is waited for, 5 s an update; the clock stands otherwise."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(AcceleratedEngine, "wait", lambda self: now.__setitem__(0, now[0] + 5.0))
    assert train_run(config_of(training={"steps": 4, "save_every": 1, "eval_every": 9}), tmp_path / "run") == "finished"
    assert rows(tmp_path / "run", "seconds_per_step")[3] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"name": "adamw"}, {"name": "adafactor"}, "the optimizer is AdamW in it and Adafactor here"),
        (OPTIMIZERS["shampoo"], {"name": "adamw"}, "optimizer is DistributedShampoo in it and AdamW"),
        (OPTIMIZERS["shampoo"], {"name": "shampoo", "shampoo": {"block_size": 8}}, "optimizer block_size is 16 in it"),
    ],
    ids=["adafactor", "adamw", "settings"],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    tmp_path: Path, config_of: Callable[..., RunConfig], before: dict, after: dict, reason: str
) -> None:
    assert train_run(config_of(training={"steps": 1}, optimizer=before), tmp_path / "run") == "finished"
    with pytest.raises(CheckpointError) as caught:
        train_run(config_of(optimizer=after), tmp_path / "run")
    assert reason in str(caught.value) and "exp_avg" not in str(caught.value)
    assert CheckpointFolder(str(tmp_path / "run" / "checkpoints")).steps() == [1]


def test_what_a_scorer_finds_is_logged_with_the_losses(tmp_path: Path, config_of: Callable[..., RunConfig]) -> None:
    seen = []

    def scorer(model: torch.nn.Module, step: int) -> dict[str, float]:
        seen.append((step, model.training))
        return {"beauty": step / 10}

    assert train_run(config_of(), tmp_path / "run", scorer) == "finished"
    assert rows(tmp_path / "run", "beauty") == {3: 0.3, 6: 0.6}
    assert set(rows(tmp_path / "run", "eval_loss")) == {3, 6} and [step for step, _ in seen] == [3, 6]


@pytest.mark.parametrize("trained", [["embeddings"], ["decoder.layers.1.*", "lm_head.weight"]])
def test_frozen_parameters_go_with_gradient_checkpointing(
    tmp_path: Path, config_of: Callable[..., RunConfig], trained: list[str]
) -> None:
    """Where no input of a layer asks for gradients, computing it twice could lose those of its parameters."""
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        config = config_of(training={"gradient_checkpointing": checkpointing, "steps": 3}, model={"train": trained})
        assert train_run(config, tmp_path / name) == "finished"
    assert rows(tmp_path / "plain", "grad_norm")[1] > 0
    # The same numbers, and every parameter that is not trained stays as it was drawn.
    assert same(tmp_path / "plain", tmp_path / "checkpointed")
