"""What a run will take, without any of it: mesh, batches, parameters, bytes a device.

Owns: the arithmetic of `train --dry-run`. Does not own: what a compiler makes of it. Weights are never allocated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_torch.config import RunConfig
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.build import build_optimizer
from dalle_torch.optim.saving import expected_shapes
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo
from dalle_torch.parallel.mesh import BatchPlan, MeshPlan, plan_mesh
from dalle_torch.parallel.rules import Spec, lay_out, layout_rules, spec_of_state
from dalle_torch.training.speed import flops_of_sample
from dalle_torch.training.trainable import choose_trained

_GIB = 2**30


@dataclass(frozen=True)
class Share:
    """Bytes of one kind of tensor: over the whole run's model, and of the fullest device."""

    total: int
    device: int


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run."""

    mesh: MeshPlan
    batches: BatchPlan
    parameters: int
    trained: int
    flops: float
    """Of the forward and backward pass of an update's samples."""
    shares: dict[str, Share]
    """Weights, gradients and each kind of the optimizer's state."""

    def __str__(self) -> str:
        lines = [
            f"mesh        {self.mesh}",
            f"batch       {self.batches}",
            f"parameters  {self.parameters:,} in all, {self.trained:,} trained",
            f"arithmetic  {self.flops / 1e15:.3g} x 10^15 operations an update, "
            f"{self.flops / self.mesh.devices / 1e12:.3g} x 10^12 of a device",
            f"{'bytes':<34}{'GB in all':>12}{'GiB a device':>14}",
        ]
        rows = [*self.shares.items(), ("sum", _sum(self.shares.values()))]
        lines += [f"  {name:<32}{share.total / 1e9:>12.2f}{share.device / _GIB:>14.3f}" for name, share in rows]
        lines.append("activations and what a compiler adds are not in it")
        return "\n".join(lines)


def plan_run(config: RunConfig, network: DalleBartConfig, devices: int, hosts: int) -> RunPlan:
    """The plan of `config` on so many devices.

    Raises:
        ValueError: mesh, batch or layout do not come out even.
    """
    mesh = plan_mesh(config.mesh, devices, hosts, devices // hosts)
    batches = BatchPlan(mesh, config.training.batch_size, config.training.accumulation_steps)
    with torch.device("meta"):
        model = DalleBart(network)
    trained = set(choose_trained(model, config.model.train))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = lay_out(shapes, layout_rules(network), mesh.sizes, config.mesh.uneven)
    weights = _share(shapes, shapes, specs, mesh, 4)
    gradients = _share({name: shapes[name] for name in trained}, shapes, specs, mesh, 4)
    return RunPlan(
        mesh=mesh,
        batches=batches,
        parameters=sum(map(math.prod, shapes.values())),
        trained=sum(math.prod(shapes[name]) for name in trained),
        flops=flops_of_sample(network) * batches.per_update,
        shares={"weights": weights, "gradients": gradients} | _optimizer_shares(model, config, specs, mesh),
    )


def devices_of(config: RunConfig, devices_per_host: int) -> tuple[int, int]:
    """Devices and hosts that a configuration names, where nothing can be asked.

    Raises:
        ValueError: it leaves the number of copies to what is found.
    """
    if config.runtime.backend == "accelerate":
        return 1, 1
    if config.mesh.dp is None:
        raise ValueError("mesh.dp=null takes all devices there are: set it, as --set mesh.dp=32, to plan without them")
    devices = config.mesh.dp * config.mesh.mp
    if devices > devices_per_host and devices % devices_per_host:
        raise ValueError(
            f"mesh.dp x mesh.mp = {devices} is no multiple of the {devices_per_host} devices of a host "
            f"(--devices-per-host)"
        )
    return devices, max(1, devices // devices_per_host)


def _parts(shape: Sequence[int], spec: Spec, mesh: MeshPlan) -> int:
    """Entries of the fullest device."""
    sizes = mesh.sizes
    return math.prod(size if axis is None else -(-size // sizes[axis]) for size, axis in zip(shape, spec, strict=True))


def _share(
    chosen: Mapping[str, Sequence[int]],
    shapes: Mapping[str, Sequence[int]],
    specs: Mapping[str, Spec],
    mesh: MeshPlan,
    width: int,
) -> Share:
    total = sum(math.prod(shapes[name]) for name in chosen)
    return Share(total * width, sum(_parts(shapes[name], specs[name], mesh) for name in chosen) * width)


def _optimizer_shares(
    model: DalleBart, config: RunConfig, specs: Mapping[str, Spec], mesh: MeshPlan
) -> dict[str, Share]:
    """Each kind of state: what has a parameter's dimensions as the parameter, Shampoo's matrices over all devices."""
    optimizer = build_optimizer(model, config.optimizer)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, Share] = {}
    for key, shape in expected_shapes(optimizer).items():
        name, _, kind = key.rpartition("/")
        size = math.prod(shape)
        matrices = isinstance(optimizer, DistributedShampoo) and kind.startswith(("statistics.", "preconditioners."))
        if matrices:
            device: float = size / mesh.devices if config.runtime.backend == "xla" else size
        else:
            device = _parts(shape, spec_of_state(shape, shapes[name], specs[name]), mesh)
        width = 1 if _quantized(optimizer, kind, shape) else 4
        label = kind.split(".")[0].removesuffix("_scale")
        if label in ("step", "root_failures", "nonfinite_gradients"):
            continue
        before = found.get(label, Share(0, 0))
        found[label] = Share(before.total + size * width, before.device + math.ceil(device * width))
    return found


def _quantized(optimizer: torch.optim.Optimizer, kind: str, shape: Sequence[int]) -> bool:
    reduced = any(group.get("best_effort_memory_usage_reduction") for group in optimizer.param_groups)
    return reduced and kind in ("momentum", "diagonal_momentum") and len(shape) > 1


def _sum(shares: Any) -> Share:
    every = list(shares)
    return Share(sum(share.total for share in every), sum(share.device for share in every))
