"""What a run needs to go on exactly where it stopped, and its way to disk and back.

Owns: `TrainState`, checkpoints of it. Does not own: when they are written (`loop`), sharded ones (`checkpoint`).

A checkpoint is a folder `checkpoint-STEP` with the model as `from_pretrained` reads it, `optimizer.safetensors`
(moments by parameter name, so that regrouping parameters keeps them) and `state.json`.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dalle_torch.storage import CheckpointError, atomic_folder

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainState:
    """Model, optimizer and the number of updates done; batches are a function of that number."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, folder: Path, keep: int) -> Path:
        """Write `folder/checkpoint-STEP`, whole or not at all, then remove all but the newest `keep`."""
        target = folder / f"checkpoint-{self.step}"
        with atomic_folder(target) as place:
            self.model.save_pretrained(place)
            save_file(_moments(self.model, self.optimizer), place / OPTIMIZER_FILE)
            (place / STATE_FILE).write_text(json.dumps({"step": self.step}) + "\n", encoding="utf-8")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return target

    def load(self, folder: Path) -> None:
        """Take over model, optimizer and step of a checkpoint.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape; all are named.
        """
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / OPTIMIZER_FILE)
        wanted = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        problems = _differences("weights", wanted, weights)
        parameters = dict(self.model.named_parameters())
        wanted = {f"{name}/{kind}": p.shape for name, p in parameters.items() for kind in ("exp_avg", "exp_avg_sq")}
        wanted |= {f"{name}/step": torch.Size() for name in parameters}
        problems += _differences("optimizer", wanted, moments)
        if problems:
            raise CheckpointError(f"{folder} does not fit this run: " + "; ".join(problems))
        self.model.load_state_dict(weights)
        for name, parameter in parameters.items():
            self.optimizer.state[parameter] = {
                kind: moments[f"{name}/{kind}"].to(parameter.device if kind != "step" else "cpu")
                for kind in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["step"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[Any, dict[str, Tensor]] = optimizer.state
    return {
        f"{name}/{kind}": torch.as_tensor(value).contiguous()
        for name, parameter in model.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def _differences(what: str, wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> list[str]:
    problems = [f"{what} {name} is missing" for name in wanted if name not in found]
    problems += [f"{what} {name} is unknown" for name in found if name not in wanted]
    return problems + [
        f"{what} {name} has shape {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
