"""`dalle-torch train` on a mesh of eight virtual torch_xla devices: the run that one CPU makes, and its checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_torch.checkpoint.sharded import CheckpointFolder
from tests.spmd.on_devices import UNOPTIMIZED
from tests.tiny_run import OPTIMIZERS, write_run, write_source

pytestmark = pytest.mark.xla

SECTIONS: dict[str, dict[str, Any]] = {
    # Neither masks of dropout nor blank captions depend on devices then.
    "model": {"options": {"dropout": 0.0}},
    "data": {"shuffle_buffer": 0, "blank_caption_prob": 0.0},
    "optimizer": OPTIMIZERS["shampoo"] | {"schedule": "constant"},
    # 16 image tokens and 23 + 1 rows divide by 2 alone.
    "mesh": {"dp": 4, "mp": 2, "uneven": "pad"},
    "training": {"steps": 6, "batch_size": 8, "accumulation_steps": 1, "save_every": 3, "eval_every": 3},
}


def train(
    folder: Path, source: Path, backend: str, *words: str, fails: bool = False, **sections: dict[str, Any]
) -> str:
    """In a process of its own; returns what it said."""
    wanted = SECTIONS | sections | {"runtime": {"backend": backend, "device": "cpu"}}
    config = write_run(folder.with_suffix(f".{backend}.yaml"), source, **wanted)
    command = [sys.executable, "-m", "dalle_torch.cli.main", "train", "--config", str(config), "--output", str(folder)]
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "XLA_FLAGS": UNOPTIMIZED}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 1) == fails, done.stderr[-3000:]
    return done.stderr


def values(folder: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointFolder(str(folder / "checkpoints")).newest()
    assert newest is not None
    return newest.read()


def test_a_mesh_trains_as_one_cpu_and_goes_on_there_and_back(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    train(tmp_path / "cpu", source, "accelerate")
    # Three updates on the mesh, three on the CPU from its checkpoint, and three more on the mesh from that one.
    said = train(tmp_path / "mixed", source, "xla", "--set", "training.steps=3")
    assert "2 samples x 4 (dp) x 1 accumulation steps = 8 samples an update" in said
    train(tmp_path / "mixed", source, "accelerate")
    expected, found = values(tmp_path / "cpu", "loss"), values(tmp_path / "mixed", "loss")
    assert list(found) == list(expected)
    # Sums in another order.
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert values(tmp_path / "mixed", "eval_loss/valid")[6] == pytest.approx(
        values(tmp_path / "cpu", "eval_loss/valid")[6], rel=1e-4
    )
    one, other = final(tmp_path / "cpu"), final(tmp_path / "mixed")
    assert one.keys() == other.keys()

    train(tmp_path / "cpu", source, "accelerate", "--set", "training.steps=9")
    train(tmp_path / "mixed", source, "xla", "--set", "training.steps=9")
    expected, found = values(tmp_path / "cpu", "loss"), values(tmp_path / "mixed", "loss")
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-3)


def test_pictures_scores_and_histograms_on_a_mesh(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    samples = {"every": 2, "prompts": ["n1"], "condition_scale": 2.0}
    model = SECTIONS["model"] | {"vqgan": str(source / "model" / "vqgan")}
    training = SECTIONS["training"] | {"steps": 2, "histogram_every": 2}
    scores = {"every": 2, "prompts": ["a red circle"], "images": 2, "scorer": "shapes"}
    train(tmp_path / "run", source, "xla", model=model, samples=samples, scores=scores, training=training)
    drawn = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.png"))
    assert drawn == ["scores-00000002.png", "step-00000002.png"]
    assert list(values(tmp_path / "run", "score")) == [2]
    assert set(values(tmp_path / "run", "norm/gradients")) == {2}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"dp": 4, "mp": 3}, "mesh.mp=3 does not divide the 8 devices of a host"),
        ({"dp": 3, "mp": 2}, "mesh.dp=3 x mesh.mp=2 = 6, but there are 8 devices"),
        ({"dp": 8, "mp": 1}, "training.batch_size=12 is no multiple, from 8 up, of dp=8"),
    ],
)
def test_what_does_not_fit_the_devices_is_one_line(tmp_path: Path, mesh: dict[str, int], message: str) -> None:
    training = SECTIONS["training"] | {"batch_size": 12}
    said = train(tmp_path / "run", write_source(tmp_path), "xla", fails=True, mesh=mesh, training=training)
    (line,) = [line for line in said.splitlines() if line.startswith("dalle-torch: error: ")]
    assert message in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_weights_that_are_no_numbers_are_not_saved_from_a_mesh(tmp_path: Path) -> None:
    broken = OPTIMIZERS["adamw"] | {"schedule": "constant", "lr": 1e38, "warmup_steps": 0, "max_grad_norm": None}
    training = SECTIONS["training"] | {"log_every": 99, "eval_every": 99}
    said = train(
        tmp_path / "run", write_source(tmp_path), "xla", fails=True, optimizer=broken, training=training,
    )  # fmt: skip
    assert "the weights are not finite at step 3 and are not saved" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
