"""Training in two processes on the CPU: the same run as in one, and checkpoints that go from one to the other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_torch.checkpoint.sharded import CheckpointFolder
from dalle_torch.cli.main import main
from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.training.control import Mailbox, parse_request
from tests.tiny_run import OPTIMIZERS, write_run, write_source

# Neither order nor masks of dropout depend on the number of processes then.
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"shuffle_buffer": 0, "lanes": 2, "blank_caption_prob": 0.0},
    "model": {"options": {"dropout": 0.0}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


def launch(config: Path, output: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dalle_torch.cli.main", "train", "--config", str(config), "--output", str(output), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def in_two(config: Path, output: Path, *words: str) -> None:
    process = launch(config, output, *words)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def in_one(config: Path, output: Path, *words: str) -> None:
    assert main(["train", "--config", str(config), "--output", str(output), *words]) == 0


def losses(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None and newest.step == 6
    return {name: value for name, value in newest.read().items() if name.startswith("model/")}


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "shampoo"), ("fsdp", "adamw")])
def test_two_processes_train_as_one_and_hand_over_to_one(
    parallel: str, optimizer: str, source: Path, tmp_path: Path
) -> None:
    sections = SECTIONS | {"optimizer": OPTIMIZERS[optimizer] | {"schedule": "constant"}}
    sections["runtime"] = {"parallel": parallel}
    if parallel == "ddp":  # one process draws while the other waits
        sections["model"] = SECTIONS["model"] | {"vqgan": str(source / "model" / "vqgan")}
        sections["samples"] = {"every": 2, "prompts": ["a red circle"]}
        sections["scores"] = {"every": 3, "prompts": ["a red circle"], "scorer": "shapes"}
    config = write_run(tmp_path / "run.yaml", source, **sections)
    in_one(config, tmp_path / "one")
    # The first half in two, the second in one: what was sharded is put together. Layers that are computed twice give
    # the same gradients, under DDP and FSDP2 too.
    checkpointed = ["--set", "training.gradient_checkpointing=true"]
    in_two(config, tmp_path / "two", "--set", "training.steps=4", *checkpointed)
    in_one(config, tmp_path / "two")
    # Sums in another order; Adam divides by the roots of small ones.
    for key in ("loss", "grad_norm"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-3), key
    assert losses(tmp_path / "two", "eval_loss")[-1] == pytest.approx(losses(tmp_path / "one", "eval_loss")[-1], 1e-3)
    assert losses(tmp_path / "two")[:4] == pytest.approx(losses(tmp_path / "one")[:4], rel=1e-5)
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert one.keys() == two.keys()
    drawn = [sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == (5 if parallel == "ddp" else 0)
    assert len(losses(tmp_path / "two", "score")) == (2 if parallel == "ddp" else 0)
    moved = torch.cat([(one[name] - _first(source, name)).flatten() for name in one]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert apart <= 1e-2 * moved


def _first(source: Path, name: str) -> torch.Tensor:
    """A parameter before training, as seed 0 draws it."""
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart

    torch.manual_seed(0)
    config = DalleBartConfig(**DalleBartConfig.from_pretrained(source / "model").to_dict() | {"dropout": 0.0})
    return DalleBart(config).state_dict()[name.removeprefix("model/")]


def test_one_process_that_is_told_to_stop_stops_both(source: Path, tmp_path: Path) -> None:
    training = {"steps": 1_000_000, "save_every": 1_000_000, "eval_every": 1_000_000}
    config = write_run(tmp_path / "run.yaml", source, **SECTIONS | {"training": training})
    process = launch(config, tmp_path / "run")
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(losses(tmp_path / "run")) > 2):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert "the same command goes on from there" in said, said
    newest = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).newest()
    assert newest is not None and newest.step >= 3 and len(newest.host_metas) == 2


def test_both_processes_take_up_what_one_was_asked(source: Path, tmp_path: Path) -> None:
    sections = SECTIONS | {"optimizer": OPTIMIZERS["adamw"] | {"schedule": "constant"}}
    config = write_run(tmp_path / "run.yaml", source, **sections)
    request = parse_request(["learning_rate=1e-3", "beta1=0.5", "weight_decay=1"], load_config(RunConfig, config))
    for name in ("one", "two"):
        Mailbox([str(tmp_path / name / "control")]).send(request)
    in_one(config, tmp_path / "one")
    in_two(config, tmp_path / "two")
    assert losses(tmp_path / "two", "lr")[2:] == [1e-3] * 4
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    moved = torch.cat([(one[name] - _first(source, name)).flatten() for name in one]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    # Sums in another order.
    assert apart <= 1e-3 * moved
