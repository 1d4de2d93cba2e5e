"""What a training loop asks of the devices it runs on, the same for torch_xla and for accelerate.

Owns: the protocol, and the choice between its two sides. Does not own: them (`accelerated`, `spmd_engine`), or what is
computed (`training.step`).

A run has one process a host on torch_xla, which drives all of the host's devices as parts of one mesh, and one process
a device with accelerate. Every process runs the same loop over the same steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_torch.config import MeshConfig, RuntimeConfig, TrainingConfig
from dalle_torch.parallel.mesh import BatchPlan, MeshPlan
from dalle_torch.parallel.rules import Rule

Precision = Literal["float32", "bfloat16"]


class Engine(Protocol):
    """The devices of a run, and what has to be done differently on them.

    Attributes:
        name: "xla" or "accelerate".
        device: where this process puts tensors.
        host_index, host_count: of the processes, each of which reads a share of the data.
        mesh: all devices.
    """

    name: str
    device: torch.device
    host_index: int
    host_count: int
    mesh: MeshPlan

    def place(self, model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
        """Move `model` to the devices, each with its part of it, and return what the step calls in its place.

        Parameters can be new ones afterwards, of `model` itself: make the optimizer, by name, after this.

        Args:
            model: the same in every process.
            rules: how parameters lie on a mesh, `rules.layout_rules`; looked at on torch_xla alone.

        Raises:
            ValueError: the model cannot be laid out.
        """
        ...

    def set_up_layers(self, model: nn.Module, *, checkpoint: bool, scan: bool) -> None:
        """Choose how the layers of `model`, which has been placed, are run.

        Args:
            checkpoint: keep of each layer its inputs alone for the backward pass (`training.gradient_checkpointing`).
            scan: run the layers of a stack as a loop (`training.use_scan`), on torch_xla; elsewhere layers are not
                compiled one after the other, and nothing changes.

        Raises:
            ValueError: these layers cannot be run so.
        """
        ...

    def optimizer_options(self, optimizer: str) -> dict[str, Any]:
        """What an optimizer of that name (`config.OptimizerConfig.name`) has to be made with here.

        Raises:
            ValueError: it does not run here.
        """
        ...

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Lay state out as the parameters that it is of, after it was created or loaded. Shampoo does so by itself."""
        ...

    def put(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The rows of this process of some batches of equal shape, on the devices; what comes back is all rows there
        on torch_xla, and the same rows elsewhere. The same number of rows in every process."""
        ...

    def scalar(self, value: float) -> float | Tensor:
        """A number that changes from step to step, as a step takes it without being compiled again."""
        ...

    def autocast(self, precision: Precision) -> AbstractContextManager[None]:
        """Forward passes in it compute in that precision; parameters stay as they are."""
        ...

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a pass whose gradients add to those of others: only after the last one processes exchange them."""
        ...

    def gradients_done(self, model: nn.Module) -> None:
        """After the backward passes of an update, before anything is done with the gradients."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients down to a norm of `max_norm` over all of them; returns the norm before, a tensor []."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of what each computed of its own rows."""
        ...

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass through `torch.compile`, where that is to be had."""
        ...

    def end_step(self) -> None:
        """Start what was recorded of the step, without waiting for it."""
        ...

    def wait(self) -> None:
        """Return when the device has nothing left to do."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, in the order of their numbers; small, and able to be pickled."""
        ...

    def barrier(self) -> None:
        """Return when every process has come here."""
        ...

    def close(self) -> None:
        """Leave the other processes in order."""
        ...


def start_engine(runtime: RuntimeConfig, mesh: MeshConfig) -> Engine:
    """Bring up the devices of this process and, where a launcher started several, find the others.

    Raises:
        ValueError: the devices are not there, or the mesh does not fit them.
    """
    if runtime.backend == "xla":
        from dalle_torch.parallel.spmd_engine import SpmdEngine

        return SpmdEngine(runtime, mesh)
    from dalle_torch.parallel.accelerated import AcceleratedEngine

    return AcceleratedEngine(runtime)


def gather_objects(value: Any, host_count: int) -> list[Any]:
    """What every process passed; over torch.distributed where there are several."""
    if host_count == 1:
        return [value]
    found: list[Any] = [None] * host_count
    dist.all_gather_object(found, value)
    return found


def plan_batches(engine: Engine, training: TrainingConfig) -> BatchPlan:
    """How the samples of an update are shared out.

    Raises:
        ValueError: the devices do not get equally many.
    """
    return BatchPlan(engine.mesh, training.batch_size, training.accumulation_steps)
