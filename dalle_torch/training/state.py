"""What a run needs to go on exactly where it stopped, and its way into a checkpoint and back.

Owns: what a checkpoint holds and which ones fit a run. Does not own: files and their commitment (`checkpoint`), when
they are written (`loop`).

Tensors go by `model/NAME` and `optimizer/NAME/KIND`. `meta` has the step, what the schedule has seen, which optimizer
it was, the model's and the run's configuration, the place in the data, and which settings were changed when; each
process adds the states of its random generators.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dalle_torch.checkpoint.index import Stack
from dalle_torch.checkpoint.sharded import Checkpoint
from dalle_torch.log import get_logger
from dalle_torch.optim.saving import describe, expected_shapes, misfits, open_state, state_tensors
from dalle_torch.optim.schedules import PlateauState
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo
from dalle_torch.optim.shampoo.saving import StateStack
from dalle_torch.storage import CheckpointError

logger = get_logger(__name__)

FORMAT = 2
_MODEL, _OPTIMIZER = "model/", "optimizer/"


@dataclass
class TrainState:
    """Model, optimizer, the number of updates done, and what the schedule has seen of evaluations."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    plateau: PlateauState = field(default_factory=PlateauState)

    def tensors(self) -> dict[str, Tensor]:
        """What is to be saved and is not in `stacks`; the tensors themselves, not copies."""
        if isinstance(self.optimizer, DistributedShampoo):
            return self._weights()
        return self._weights() | {f"{_OPTIMIZER}{name}": value for name, value in state_tensors(self.optimizer).items()}

    def stacks(self) -> list[Stack]:
        """The optimizer's tensors which hold several parameters' each: as they are kept, without a program."""
        if not isinstance(self.optimizer, DistributedShampoo):
            return []
        return _named(self.optimizer.state_stacks())

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether the trained parameters hold finite numbers alone, of FSDP2's those that this process has.

        Waits for the device.
        """
        parts = [getattr(value, "_local_tensor", value) for value in self.model.parameters() if value.requires_grad]
        return bool(torch.stack([part.isfinite().all() for part in parts]).all())

    def meta(self) -> dict[str, Any]:
        """What goes with the tensors, for JSON."""
        return {
            "format": FORMAT,
            "step": self.step,
            "model": self.model.config.to_diff_dict(),
            "optimizer": describe(self.optimizer),
            "plateau": asdict(self.plateau),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over everything of a checkpoint, made on any devices.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, or the optimizer was another one or had
                other settings; all are named, and nothing was changed.
        """
        meta = checkpoint.meta
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{checkpoint.url} has format {meta.get('format')!r}, and {FORMAT} is read here")
        self._check(checkpoint)
        if isinstance(self.optimizer, DistributedShampoo):
            # Room for what was saved.
            open_state(self.optimizer, _updates(checkpoint), checkpoint.meta["optimizer"])
        checkpoint.load(self.tensors(), self.stacks())
        self.step, self.plateau = int(meta["step"]), PlateauState(**meta["plateau"])

    def _weights(self) -> dict[str, Tensor]:
        return {f"{_MODEL}{name}": value for name, value in self.model.state_dict().items()}

    def _check(self, checkpoint: Checkpoint) -> None:
        wanted = {name: tuple(value.shape) for name, value in self._weights().items()}
        # Of another optimizer, or with other settings, all tensors differ, which says nothing more.
        problems = misfits(self.optimizer, checkpoint.meta["optimizer"], _updates(checkpoint))
        if not problems:
            expected = expected_shapes(self.optimizer)
            wanted |= {f"{_OPTIMIZER}{name}": tuple(shape) for name, shape in expected.items()}
        found = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(_MODEL) or not problems}
        problems = _differences(wanted, found) + problems
        if problems:
            remedy = "train with the options it was made with, or into another folder"
            raise CheckpointError(f"{checkpoint.url} does not fit this run: {'; '.join(problems[:20])}; {remedy}")


def _named(stacks: Sequence[StateStack]) -> list[Stack]:
    return [
        Stack(stack.tensor, [f"{_OPTIMIZER}{key}/{stack.kind}" for key in stack.keys], stack.rows) for stack in stacks
    ]


def _updates(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The counts of updates in it, and beside them what else there is of the optimizer, without its values."""
    names = [name for name in checkpoint.shapes if name.startswith(_OPTIMIZER)]
    counts = checkpoint.read(name for name in names if name.endswith("/step"))
    return {
        name.removeprefix(_OPTIMIZER): counts[name]
        if name in counts
        else torch.empty(checkpoint.shapes[name], dtype=checkpoint.dtypes[name], device="meta")
        for name in names
    }


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    return problems + [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]


def random_states() -> dict[str, str]:
    """The states of torch's generators in this process, for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_states(states: Mapping[str, str]) -> None:
    """Take over what `random_states` gave, as far as the devices are here."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
