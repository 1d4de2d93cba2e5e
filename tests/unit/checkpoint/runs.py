"""The folder of a small run, as training leaves it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from dalle_torch import DalleBart
from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from tests.tiny_pipeline import tiny_model, tiny_processor

STEPS = (10, 20)


def model_of(step: int) -> DalleBart:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        return tiny_model()


def make_run(folder: Path, *, checkpoints: str | None = None, **meta: Any) -> Path:
    """Two checkpoints, metrics, processor and configuration; `meta` is laid over that of the checkpoints."""
    config = RunConfig(
        model=ModelConfig(config="someone/tiny"),
        data=DataConfig(train=["gs://someone:key@bucket/shards/{0..9}.tar?token=secret", "/home/me/pictures/0.tar"]),
        checkpoint=CheckpointConfig(folder=checkpoints),
    )
    values = dataclasses.asdict(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    tiny_processor().save_pretrained(folder / "processor")
    rows = [{"step": step, "loss": 5 / step, "lr": 1e-3} for step in range(1, 101)]
    rows += [{"step": step, "eval_loss": 6 / step} for step in (50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "lo')
    saved = CheckpointFolder(checkpoints or str(folder / "checkpoints"))
    for step in STEPS:
        model = model_of(step)
        tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"optimizer/{name}/exp_avg": torch.zeros_like(value) for name, value in model.named_parameters()}
        found = {"step": step, "config": values, "model": model.config.to_dict(), "history": []}
        saved.save(step, tensors, found | meta)
    return folder
