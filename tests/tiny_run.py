"""A whole run of training that takes seconds: its model, its shards, its options."""

from pathlib import Path
from typing import Any

import yaml

from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from tests.shard_files import token_tar
from tests.tiny_pipeline import tiny_pipeline

SAMPLES = 40
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.1},
    "adafactor": {"name": "adafactor", "lr": 1e-2, "warmup_steps": 2},
    "shampoo": {
        "name": "shampoo", "lr": 3e-3, "warmup_steps": 2,
        "shampoo": {"block_size": 16, "start_preconditioning_step": 2, "preconditioning_compute_steps": 3},
    },
}  # fmt: skip


def write_source(folder: Path) -> Path:
    """A model with tokenizer and VQGAN, and shards for training and evaluation."""
    tiny_pipeline().save_pretrained(folder / "model")
    token_tar(folder / "shards" / "0.tar", range(13))
    token_tar(folder / "shards" / "1.tar", range(13, SAMPLES))
    token_tar(folder / "valid" / "0.tar", range(100, 111))
    return folder


def options(source: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The options of a run as YAML has them; `sections` are laid over them key by key."""
    base: dict[str, dict[str, Any]] = {
        "model": {"config": str(source / "model"), "codebook_size": 20},
        "data": {
            "train": [str(source / "shards")], "evaluation": {"valid": [str(source / "valid")]}, "lanes": 4,
            "workers": 0, "shuffle_buffer": 16, "blank_caption_prob": 0.25,
        },
        "optimizer": OPTIMIZERS["adamw"],
        "training": {
            "steps": 6, "batch_size": 8, "accumulation_steps": 2, "log_every": 1, "eval_every": 3, "save_every": 2,
        },
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    for name, section in sections.items():
        # Of an optimizer and of a model, options of one do not suit another.
        whole = name == "optimizer" or "weights" in section
        base[name] = section if whole else base.get(name, {}) | section
    return base


def write_run(path: Path, source: Path, **sections: dict[str, Any]) -> Path:
    """The same as a file."""
    path.write_text(yaml.safe_dump(options(source, **sections)), encoding="utf-8")
    return path


def run_config(path: Path, source: Path, **sections: dict[str, Any]) -> RunConfig:
    """The same, read from the file `path` that is written."""
    return load_config(RunConfig, write_run(path, source, **sections))
