"""Training on CPUs and GPUs through accelerate: one process a device.

Owns: what `engine.Engine` asks for, by accelerate's means; the only file that imports accelerate for training. Does not
own: launching processes (torchrun does), the step.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_torch.config import RuntimeConfig
from dalle_torch.parallel.checkpointing import checkpoint_layers
from dalle_torch.parallel.engine import Precision, gather_objects
from dalle_torch.parallel.launched import launched_processes
from dalle_torch.parallel.mesh import MeshPlan
from dalle_torch.parallel.rules import Rule
from dalle_torch.parallel.runtime import pick_device


class AcceleratedEngine:
    """CPU, one GPU, or several through DistributedDataParallel or FSDP2; see `engine.Engine`.

    Raises:
        ValueError: the device is not there, torch_xla would take the process over, or a launcher said what cannot be.
    """

    name = "accelerate"

    def __init__(self, runtime: RuntimeConfig) -> None:
        self._accelerator = _accelerator(runtime, launched_processes())
        self.device: torch.device = self._accelerator.device
        self.host_index: int = self._accelerator.process_index
        self.host_count: int = self._accelerator.num_processes
        self.mesh = MeshPlan(self.host_count, self.host_count)
        self._fsdp = runtime.parallel == "fsdp" and self.host_count > 1

    def place(self, model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
        model.to(self.device)
        if self._fsdp:
            return self._spread(model)
        return model if self.host_count == 1 else self._accelerator.prepare(model)

    def _spread(self, model: nn.Module) -> nn.Module:
        """FSDP2 by torch itself: accelerate leaves it out on CPUs, and does the same elsewhere."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.host_count,))
        for stack in ("encoder", "decoder"):
            for layer in getattr(model, stack).layers:
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def set_up_layers(self, model: nn.Module, *, checkpoint: bool, scan: bool) -> None:
        checkpoint_layers(model, checkpoint, self.device.type)

    def optimizer_options(self, optimizer: str) -> dict[str, Any]:
        return {}

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        """State is created where its parameter is."""

    def put(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        if self.device.type == "cpu":
            return [dict(batch) for batch in batches]
        return [
            {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in batch.items()}
            if self.device.type == "cuda"
            else {name: value.to(self.device) for name, value in batch.items()}
            for batch in batches
        ]

    def scalar(self, value: float) -> float | Tensor:
        return value

    def autocast(self, precision: Precision) -> AbstractContextManager[None]:
        if precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, precision))

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        if self._fsdp:
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self._accelerator.no_sync(model)

    def gradients_done(self, model: nn.Module) -> None:
        """DistributedDataParallel and FSDP2 have exchanged them in the backward pass."""

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        # FSDP2's parameters are spread out, and so is the norm of their gradients.
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def mean(self, value: Tensor) -> Tensor:
        return self._accelerator.reduce(value, "mean") if self.host_count > 1 else value

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(step)

    def end_step(self) -> None:
        """CPUs and GPUs start at once."""

    def wait(self) -> None:
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def gather(self, value: Any) -> list[Any]:
        return gather_objects(value, self.host_count)

    def barrier(self) -> None:
        if self.host_count > 1:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        self._accelerator.end_training()
        if self.host_count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _accelerator(runtime: RuntimeConfig, launched: int) -> Any:
    if launched > 1:
        # accelerate looks for others only where there is one, and launchers of one process a host need not set it.
        os.environ.setdefault("LOCAL_RANK", "0")
    if os.environ.get("USE_TORCH_XLA", "1").lower() not in ("0", "false", "no"):
        # Read by accelerate when it is imported; with torch_xla installed it takes xla:0 for whatever was asked.
        os.environ["USE_TORCH_XLA"] = "0"
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=runtime.timeout_minutes))
    accelerator = Accelerator(cpu=pick_device(runtime.device).type == "cpu", kwargs_handlers=[patience])
    if accelerator.device.type == "xla":
        raise ValueError(
            "runtime.backend=accelerate, but accelerate was imported before and took torch_xla's device: set "
            "USE_TORCH_XLA=0 in the environment, or runtime.backend to xla"
        )
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE={launched} in the environment, but accelerate found {accelerator.num_processes} processes on "
            f"{accelerator.device.type}: each would train by itself; set runtime.device to cpu or cuda, or start one "
            f"process"
        )
    return accelerator
