"""Training on torch_xla devices, TPUs above all: one process a host, one program for the mesh of all their devices.

Owns: what `engine.Engine` asks for, by torch_xla's means. Does not own: meshes and marks (`spmd`), launching processes,
the step, which is recorded from its first operation to `end_step` and compiled as a whole.

Precision. A TPU multiplies float32 in bfloat16 unless it is told otherwise, and the roots of Shampoo need more. What it
is told holds for a whole program (it is read when that is compiled), so it is told "highest" for all: float32 then is
float32, and operands in bfloat16, as forward and backward passes have with `training.precision=bfloat16`, have no more
digits to be multiplied.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_torch.config import MeshConfig, RuntimeConfig
from dalle_torch.parallel import spmd
from dalle_torch.parallel.checkpointing import checkpoint_layers
from dalle_torch.parallel.copies import CopyWeights, part_ends
from dalle_torch.parallel.engine import Precision, gather_objects
from dalle_torch.parallel.launched import launched_processes
from dalle_torch.parallel.mesh import AXES, MeshPlan
from dalle_torch.parallel.products import keep_heads_apart
from dalle_torch.parallel.rules import Rule, Spec, lay_out, spec_of_state
from dalle_torch.parallel.runtime import let_devices_wait, pick_device
from dalle_torch.parallel.scan import narrow_states, scan_layers
from dalle_torch.parallel.shampoo import ShampooSharding


class SpmdEngine:
    """All devices of all hosts as a mesh; see `engine.Engine`.

    Attributes:
        xla_mesh: the `torch_xla.distributed.spmd.Mesh`.
        specs: how each parameter of the placed model lies on it, by name.

    Raises:
        ValueError: torch_xla or its devices are not there, hosts do not know of each other, or the mesh does not fit.
    """

    name = "xla"

    def __init__(self, runtime: RuntimeConfig, mesh: MeshConfig) -> None:
        self.device: torch.device = _start(runtime)
        self.host_index = dist.get_rank() if dist.is_initialized() else 0
        self.host_count = dist.get_world_size() if dist.is_initialized() else 1
        self.mesh: MeshPlan
        self.mesh, self.xla_mesh = spmd.start_mesh(mesh)
        self.specs: dict[str, Spec] = {}
        self._waiting: list[dict[str, Tensor]] = []
        self._copies: CopyWeights | None = None
        self._uneven = mesh.uneven
        self._spec_of: Callable[[Tensor], Spec] = _nothing_placed
        self._groups = groups_of_devices(spmd.local_devices(), self.mesh.mp)

    def place(self, model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.specs = lay_out(shapes, rules, self.mesh.sizes, self._uneven)
        spmd.place(model, self.device, self.xla_mesh, self.specs)
        self._spec_of = spmd.spec_lookup(model, self.specs)
        self.end_step()
        spmd.check_layout(model, self.xla_mesh, self.specs)
        return model

    def set_up_layers(self, model: nn.Module, *, checkpoint: bool, scan: bool) -> None:
        checkpoint_layers(model, checkpoint, self.device.type)
        keep_heads_apart(model)
        stacks = [getattr(model, stack) for stack in ("encoder", "decoder")]
        narrow_states(stacks)
        if scan:
            self._copies = CopyWeights(self.xla_mesh, self._spec_of)
            scan_layers(stacks, self.xla_mesh, self._spec_of, self._copies, recompute=checkpoint)
            part_ends(model, self._copies)

    def optimizer_options(self, optimizer: str) -> dict[str, Any]:
        if optimizer == "shampoo":
            return {"sharding": ShampooSharding(self.xla_mesh, self._spec_of)}
        # The count of steps is on the device: as a number it would make every step another program.
        if optimizer == "adafactor":
            return {"capturable": True}
        return {"capturable": True, "fused": False, "foreach": False}

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.device.type == "xla":
                    spec = spec_of_state(value.shape, parameter.shape, self._spec_of(parameter))
                    spmd.mark(value, self.xla_mesh, spec)
        self.end_step()

    def put(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        if self._copies is not None:
            self._copies.begin(len(batches))
        whole = {name: self._spread([batch[name] for batch in batches]) for name in batches[0]}
        self._waiting = [
            {name: of_batches[index] for name, of_batches in whole.items()} for index in range(len(batches))
        ]
        return list(self._waiting)

    def _spread(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The rows of all hosts, those of one mp group on the devices of that group, for each batch.

        torch_xla takes a host's share of a tensor only if that is split over all devices, along its first dimension,
        and rows need not divide so. Each device is therefore sent those of its group, in a slice of its own; on the
        mesh one of the mp equal slices is then taken.

        Args:
            rows: of this host, [groups x R, ...] each.

        Returns:
            [dp x R, ...] each, in the order of the hosts and of the rows of each.
        """
        groups = self.mesh.groups_per_host
        if uneven := [len(value) for value in rows if len(value) % groups]:
            raise ValueError(
                f"{uneven[0]} samples of a host do not divide over its {groups} mp groups (mesh: {self.mesh}): give "
                f"a multiple of {groups}"
            )
        sent = torch.stack([value.unflatten(0, (groups, -1)) for value in rows], dim=1)[self._groups]
        if sent.dtype == torch.int64:
            # Tokens; a TPU makes an int64 of two int32, and half of it would be sent for nothing.
            sent = sent.int()
        of_groups = self._send(sent.contiguous()).unflatten(0, (self.mesh.dp, self.mesh.mp))[:, 0]
        by_rows = ("dp", *(None,) * (rows[0].ndim - 1))
        whole = [of_groups[:, index].flatten(0, 1).to(value.dtype) for index, value in enumerate(rows)]
        return [spmd.mark(value, self.xla_mesh, by_rows) for value in whole]

    def _send(self, rows: Tensor) -> Tensor:
        """[devices of this host, ...] to [all devices, ...], of which each has what its host had for it."""
        import torch_xla.core.xla_model as xm
        from torch_xla.distributed import spmd as xla_spmd

        split = xla_spmd.ShardingSpec(self.xla_mesh, (AXES, *(None,) * (rows.ndim - 1)), minibatch=True)
        (received,) = xm.send_cpu_data_to_device([rows], self.device, input_sharding=split)
        return received

    def scalar(self, value: float) -> float | Tensor:
        # Of a tensor [] torch_xla makes a constant of the program where the value is 0 or 1.
        return torch.tensor([value], dtype=torch.float32).to(self.device)[0]

    def autocast(self, precision: Precision) -> AbstractContextManager[None]:
        if precision == "float32":
            return nullcontext()
        return torch.autocast("xla", getattr(torch, precision))

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """The next pass waits for the gradients of this one.

        Left alone, XLA runs the passes' forward parts side by side, and the activations of all are in memory at once.
        """
        import torch_xla.core.xla_model as xm

        yield
        self._waiting.pop(0)
        if not last:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            gradients += [] if self._copies is None else self._copies.gradients
            xm.optimization_barrier_([*gradients, *(rows for batch in self._waiting for rows in batch.values())])

    def gradients_done(self, model: nn.Module) -> None:
        if self._copies is not None:
            self._copies.collect()
        spmd.mark_gradients(model, self.xla_mesh, self.specs)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, for which the limit is a constant of the program."""
        found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for _, value in found]))
        factor = (self.scalar(max_norm) / (norm + 1e-6)).clamp(max=1.0)
        for parameter, value in found:
            # Gradients of looped layers are views of one tensor, all of which would be written anew for each.
            parameter.grad = spmd.mark(value * factor, self.xla_mesh, self._spec_of(parameter))
        return norm

    def mean(self, value: Tensor) -> Tensor:
        return value

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return step

    def end_step(self) -> None:
        import torch_xla

        torch_xla.sync()

    def wait(self) -> None:
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()

    def gather(self, value: Any) -> list[Any]:
        return gather_objects(value, self.host_count)

    def barrier(self) -> None:
        if self.host_count > 1:
            dist.barrier()

    def close(self) -> None:
        self.wait()
        if dist.is_initialized():
            dist.destroy_process_group()


def _start(runtime: RuntimeConfig) -> torch.device:
    """The device that stands for all of them, hosts in contact, SPMD and full precision on."""
    launched = launched_processes()
    if launched > 1 and not dist.is_initialized():
        # torch_xla's own way to find the others makes groups that cannot exchange what a mesh needs in SPMD mode.
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=runtime.timeout_minutes))
    try:
        import torch_xla.runtime as xr
    except ImportError as error:
        raise ValueError(f"runtime.backend=xla needs torch_xla (pip install 'dalle-torch[xla]'): {error}") from error
    let_devices_wait()
    # Before anything touches a device.
    xr.use_spmd()
    device = pick_device("xla")
    use_full_precision()
    if xr.process_count() != launched:
        raise ValueError(
            f"torch_xla counts {xr.process_count()} hosts, but the environment says WORLD_SIZE={launched}: start one "
            f"process on every host, with RANK (0 to {xr.process_count() - 1}), WORLD_SIZE={xr.process_count()}, and "
            f"MASTER_ADDR and MASTER_PORT of the first one in its environment"
        )
    return device


def use_full_precision() -> None:
    """Have float32 multiplied as float32 in all programs from here on."""
    import torch_xla.backends

    if torch_xla.backends.get_mat_mul_precision() != "highest":
        torch_xla.backends.set_mat_mul_precision("highest")


def groups_of_devices(numbers: Sequence[int], mp: int) -> list[int]:
    """For each device of a host, numbered in its runtime's order, the number of its mp group among the host's."""
    places = {number: place for place, number in enumerate(sorted(numbers))}
    return [places[number] // mp for number in numbers]


def _nothing_placed(parameter: Tensor) -> Spec:
    raise RuntimeError("the engine has placed no model yet: call place() before the optimizer is made")
