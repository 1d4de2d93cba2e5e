"""What a run needs to go on exactly where it stopped, and its way to disk and back.

Owns: `TrainState`, checkpoints of it. Does not own: when they are written (`loop`), sharded ones (`checkpoint`).

A checkpoint is a folder `checkpoint-STEP` with the model as `from_pretrained` reads it, `optimizer.safetensors`
(its tensors by parameter name, so that regrouping parameters keeps them) and `state.json`: the step, which optimizer it
was, and what the learning rate's schedule has seen.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dalle_torch.optim.saving import describe, expected_shapes, load_state, misfits, state_tensors
from dalle_torch.optim.schedules import PlateauState
from dalle_torch.storage import CheckpointError, atomic_folder

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainState:
    """Model, optimizer, the number of updates done, and what the schedule has seen of evaluations.

    Batches are a function of the number.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    plateau: PlateauState = field(default_factory=PlateauState)

    def save(self, folder: Path, keep: int) -> Path:
        """Write `folder/checkpoint-STEP`, whole or not at all, then remove all but the newest `keep`."""
        target = folder / f"checkpoint-{self.step}"
        with atomic_folder(target) as place:
            self.model.save_pretrained(place)
            save_file(state_tensors(self.optimizer), place / OPTIMIZER_FILE)
            rest = {"step": self.step, "optimizer": describe(self.optimizer), "plateau": asdict(self.plateau)}
            (place / STATE_FILE).write_text(json.dumps(rest) + "\n", encoding="utf-8")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return target

    def load(self, folder: Path) -> None:
        """Take over model, optimizer, step and schedule of a checkpoint.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape, or the optimizer was another one or had
                other settings; all are named, and nothing was changed.
        """
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / OPTIMIZER_FILE)
        # Files from before there was a choice of optimizers say nothing of them.
        rest: dict[str, Any] = {"optimizer": {"name": "AdamW"}, "plateau": {}}
        rest |= json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        wanted = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        problems = _differences("weights", wanted, weights)
        # Of another optimizer, or with other settings, all tensors differ, which says nothing more.
        problems += misfits(self.optimizer, rest["optimizer"], tensors) or _differences(
            "optimizer", expected_shapes(self.optimizer) if rest["step"] else {}, tensors
        )
        if problems:
            remedy = "train with the options it was made with, or into another folder"
            raise CheckpointError(f"{folder} does not fit this run: {'; '.join(problems)}; {remedy}")
        self.model.load_state_dict(weights)
        load_state(self.optimizer, tensors, rest["optimizer"])
        self.step, self.plateau = int(rest["step"]), PlateauState(**rest["plateau"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _differences(what: str, wanted: dict[str, torch.Size], found: dict[str, Tensor]) -> list[str]:
    problems = [f"{what} {name} is missing" for name in wanted if name not in found]
    problems += [f"{what} {name} is unknown" for name in found if name not in wanted]
    return problems + [
        f"{what} {name} has shape {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
