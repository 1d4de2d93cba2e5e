"""`dalle-torch train` as its user types it: a run, its folder, its continuation, and every kind of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.cli.main import main
from dalle_torch.training.run_folder import RunFolder
from tests.shard_files import token_tar
from tests.tiny_run import OPTIMIZERS, write_run, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def train(tmp_path: Path, source: Path) -> Callable[..., int]:
    """Runs the command on a file with these sections; the run's folder is `run`."""

    def command(*words: str, output: str = "run", **sections: dict[str, Any]) -> int:
        config = write_run(tmp_path / "run.yaml", source, **sections)
        return main(["train", "--config", str(config), "--output", str(tmp_path / output), *words])

    return command


def rows(folder: Path, key: str) -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None
    return newest.read()


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_leaves_everything_and_goes_on_where_it_was(
    optimizer: str, train: Callable[..., int], tmp_path: Path
) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer] | {"schedule": "constant"}}
    assert train(output="whole", **options) == 0
    whole = tmp_path / "whole"
    assert set(rows(whole, "loss")) == {1, 2, 3, 4, 5, 6}
    assert set(rows(whole, "eval_loss/valid")) == {3, 6}
    assert all(0 <= wait <= 1 for wait in rows(whole, "input_wait").values())
    assert CheckpointFolder(str(whole / "checkpoints")).steps() == [4, 6]
    assert yaml.safe_load((whole / "config.yaml").read_text())["training"]["steps"] == 6
    assert (whole / "processor" / "tokenizer.json").is_file()

    assert train("--set", "training.steps=3", output="halves", **options) == 0
    assert train(output="halves", **options) == 0
    halves = tmp_path / "halves"
    assert equal(final(halves), final(whole))
    assert rows(halves, "loss") == rows(whole, "loss")
    assert rows(halves, "eval_loss") == rows(whole, "eval_loss")


def test_a_finished_run_has_nothing_left_to_do(train: Callable[..., int], tmp_path: Path) -> None:
    assert train() == 0
    before = final(tmp_path / "run")
    assert train() == 0
    assert equal(final(tmp_path / "run"), before)


def test_fine_tuning_trains_what_it_is_told_to(train: Callable[..., int], tmp_path: Path, source: Path) -> None:
    model = {"weights": str(source / "model"), "codebook_size": 20, "train": ["embeddings"]}
    assert train(model=model) == 0
    start = {f"model/{name}": value for name, value in _weights(source / "model").items()}
    changed = {
        name for name, value in final(tmp_path / "run").items() if name in start and not value.equal(start[name])
    }
    assert changed and all("embed_" in name or "lm_head" in name for name in changed)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_pictures_and_histograms_on_the_way(train: Callable[..., int], tmp_path: Path, source: Path) -> None:
    samples = {"every": 3, "prompts": ["n1", "n2"], "images": 2, "condition_scale": 2.0}
    model = {"vqgan": str(source / "model" / "vqgan")}
    assert train(model=model, samples=samples, training={"histogram_every": 2}) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000003.png", "step-00000006.png",
    ]  # fmt: skip
    norms, before_clipping = rows(tmp_path / "run", "norm/gradients"), rows(tmp_path / "run", "grad_norm")
    assert norms == {step: pytest.approx(before_clipping[step], rel=1e-5) for step in (2, 4, 6)}
    # Drawing changes nothing of the training.
    assert train(output="plain", model=model) == 0
    assert equal(final(tmp_path / "plain"), final(tmp_path / "run"))


@pytest.mark.parametrize("changes", [
    {"training": {"accumulation_steps": 1, "batch_size": 16}},
    {"training": {"gradient_checkpointing": True}},
])  # fmt: skip
def test_the_same_samples_in_other_portions_give_the_same_losses(
    changes: dict[str, Any], train: Callable[..., int], tmp_path: Path
) -> None:
    # Neither order nor masks of dropout depend on portions then.
    options: dict[str, Any] = {
        "optimizer": OPTIMIZERS["shampoo"],
        "data": {"shuffle_buffer": 0, "lanes": 1, "blank_caption_prob": 0.0},
        "model": {"options": {"dropout": 0.0}},
    }
    assert train(output="a", **options) == 0
    assert train(output="b", **options, **changes) == 0
    first, second = (list(rows(tmp_path / name, "loss").values()) for name in "ab")
    # Sums in another order; five updates by inverse roots do not make more of it than this.
    assert second == pytest.approx(first, rel=1e-5)


def test_dry_run_prints_the_plan_of_a_pod(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "configs/train/mega-v3-256.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "dp 32 x mp 8 = 256 devices (32 hosts x 8, 1 mp groups a host)" in printed
    assert "44 samples x 32 (dp) x 3 accumulation steps = 4224 samples an update, 132 of each host" in printed
    assert "2,587,521,024 in all" in printed and "preconditioners" in printed


BAD: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"training": {"stepz": 3}}, ["stepz"]),
    ({"training": {"steps": 0}}, ["steps=0 must be at least 1"]),
    ({"optimizer": {"name": "adamw", "lr": "fast"}}, ["lr", "fast"]),
    ({"mesh": {"mp": 0}}, ["mp=0 must be at least 1"]),
    ({"optimizer": OPTIMIZERS["shampoo"], "runtime": {"parallel": "fsdp"}}, ["optimizer.name=shampoo", "fsdp"]),
    ({"training": {"batch_size": 10}}, ["10 rows", "multiple of lanes=4"]),
    ({"model": {"codebook_size": 4}}, ["has no usable sample", "codes_malformed"]),
    ({"model": {"codebook_size": 99}}, ["codebook_size=99", "image_vocab_size=23"]),
    ({"model": {"options": {"encoder_vocab_size": 10}}}, ["260 tokens", "encoder_vocab_size=10"]),
    ({"model": {"options": {"d_modell": 10}}}, ["d_modell"]),
    ({"model": {"train": ["nothing.*"]}}, ["match no parameter: nothing.*"]),
    ({"data": {"train": ["/nowhere/*.tar"]}}, ["/nowhere/*.tar"]),
    ({"data": {"train": []}}, ["data.train is empty"]),
    ({"data": {"evaluation": {}}, "optimizer": {"name": "adamw", "schedule": "plateau"}}, ["data.evaluation"]),
    ({"runtime": {"device": "cuda"}}, ["cuda"]),
    ({"samples": {"every": 2, "prompts": ["a"]}}, ["model.vqgan"]),
    ({"samples": {"prompts": ["a"]}}, ["samples.prompts needs the VQGAN", "set model.vqgan"]),
    ({"scores": {"every": 2, "prompts": []}}, ["scores cannot be used: every=2 without prompts"]),
    ({"scores": {"prompts": ["a"], "scorer": "shapes"}}, ["scores.prompts needs the VQGAN"]),
]


@pytest.mark.parametrize(("sections", "words"), BAD, ids=[str(words[0]) for _, words in BAD])
def test_bad_options_are_one_line(
    sections: dict[str, dict[str, Any]],
    words: list[str],
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert train(**sections) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dalle-torch: error: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_empty_shards_are_refused(train: Callable[..., int], tmp_path: Path, capsys) -> None:
    token_tar(tmp_path / "empty" / "0.tar", [])
    assert train(data={"train": [str(tmp_path / "empty")]}) == 1
    assert "have no sample" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_and_stays(train: Callable[..., int], tmp_path: Path, capsys) -> None:
    assert train() == 0
    before = final(tmp_path / "run")
    assert train("--set", "training.steps=9", model={"options": {"d_model": 64}}) == 1
    message = capsys.readouterr().err
    assert "does not fit this run" in message and "has shape" in message
    assert equal(final(tmp_path / "run"), before)


def test_a_folder_that_cannot_be_written_is_named(train: Callable[..., int], tmp_path: Path, capsys) -> None:
    (tmp_path / "taken").write_text("a file")
    assert train(output="taken/run") == 1
    assert "taken" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tmp_path: Path, source: Path) -> None:
    with RunFolder(tmp_path / "run").acquire():
        code = "import sys; from dalle_torch.cli.main import main; sys.exit(main(sys.argv[1:]))"
        config = tmp_path / "run.yaml"
        write_run(config, source)
        words = ["train", "--config", str(config), "--output", str(tmp_path / "run")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert str(os.getpid()) in done.stderr and "in use" in done.stderr


def _child(tmp_path: Path, source: Path, **sections: dict[str, Any]) -> subprocess.Popen[str]:
    config = write_run(tmp_path / "run.yaml", source, **sections)
    code = "import sys; from dalle_torch.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "--config", str(config), "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _reached(folder: Path, step: int) -> bool:
    with_file = (folder / "metrics.jsonl").is_file()
    return with_file and any(found >= step for found in rows(folder, "loss"))


def _wait(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_a_step(signum: int, status: int, tmp_path: Path, source: Path) -> None:
    training = {"steps": 1_000_000, "save_every": 1_000_000, "eval_every": 1_000_000}
    process = _child(tmp_path, source, training=training, data={"workers": 2})
    _wait(lambda: _reached(tmp_path / "run", 3))
    # To all processes in front, as a terminal does it.
    os.killpg(process.pid, signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "the same command goes on from there" in said
    newest = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).newest()
    assert newest is not None and newest.step - max(rows(tmp_path / "run", "loss")) <= 1


def test_ctrl_c_twice_stops_at_once_and_loses_nothing_that_was_saved(tmp_path: Path, source: Path) -> None:
    # Updates of many seconds, so that both signals come in the middle of one.
    training = {"steps": 1_000_000, "save_every": 1, "accumulation_steps": 1000, "eval_every": 1_000_000}
    process = _child(tmp_path, source, training=training)
    folder = CheckpointFolder(str(tmp_path / "run" / "checkpoints"))
    _wait(lambda: folder.steps() == [1])
    before = folder.steps()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    steps = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).steps()
    assert steps and steps[-1] >= before[-1]
