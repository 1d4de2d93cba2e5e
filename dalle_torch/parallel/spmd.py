"""A model's tensors on a mesh of torch_xla devices, laid out by specs.

Owns: SPMD mode, the mesh object, marks on parameters and gradients, and reading them back. Does not own: the arithmetic
(`mesh`), which spec a parameter has (`rules`), an optimizer's state (`shampoo`).

Everything is the identity where the device is not torch_xla's, so that a training loop is the same everywhere.
torch_xla is imported only once there is something to mark.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dalle_torch.config import MeshConfig
from dalle_torch.parallel.mesh import AXES, MeshPlan, plan_mesh
from dalle_torch.parallel.rules import Spec

ModelT = TypeVar("ModelT", bound=nn.Module)


def start_mesh(config: MeshConfig) -> tuple[MeshPlan, Any]:
    """Turn SPMD on for this process and make the mesh that `config` asks for, of all hosts' devices.

    Call it before any tensor is on an XLA device; with several hosts, after `torch.distributed.init_process_group`,
    over which they tell each other their devices.

    Returns:
        The plan, and the `torch_xla.distributed.spmd.Mesh` of it.

    Raises:
        ValueError: the mesh does not fit the devices.
    """
    import torch_xla.runtime as xr

    xr.use_spmd()
    hosts, local = xr.process_count(), local_devices()
    plan = plan_mesh(config, xr.global_runtime_device_count(), hosts, devices_per_host=len(local))
    of_hosts = [local]
    if hosts > 1:
        of_hosts = [[] for _ in range(hosts)]
        torch.distributed.all_gather_object(of_hosts, local)
    return plan, make_mesh(plan, plan.device_order(of_hosts))


def local_devices() -> list[int]:
    """The numbers, among the devices of all hosts, of those that this host drives."""
    import torch_xla

    names = torch_xla._XLAC._xla_get_all_runtime_devices()
    return [names.index(name) for name in torch_xla._XLAC._xla_get_runtime_devices()]


def make_mesh(plan: MeshPlan, order: Sequence[int]) -> Any:
    """The torch_xla mesh of `plan`, filled row by row with devices in this order (`MeshPlan.device_order`)."""
    import numpy as np
    from torch_xla.distributed import spmd

    return spmd.Mesh(np.array(order), tuple(plan.sizes.values()), AXES)


def place(model: ModelT, device: torch.device, mesh: Any, specs: Mapping[str, Spec]) -> ModelT:
    """Move `model` to `device` and, on torch_xla, lay its parameters out; buffers are whole everywhere.

    On torch_xla the parameters are new ones afterwards: make the optimizer after this. What is in SPMD mode is sent to
    the devices only once it is marked, so that none of them holds a whole copy.

    Args:
        mesh: of `start_mesh`; not looked at off torch_xla.
        specs: for each parameter, of `rules.lay_out`.

    Raises:
        KeyError: a parameter has no spec.
    """
    model.to(device)
    if device.type == "xla":
        for name, parameter in model.named_parameters():
            mark(parameter, mesh, specs[name])
    return model


def mark(tensor: Tensor, mesh: Any, spec: Spec) -> Tensor:
    """`tensor`, marked in place to lie as `spec` says; on other devices than torch_xla's just `tensor`."""
    if tensor.device.type == "xla":
        from torch_xla.distributed import spmd

        spmd.mark_sharding(tensor, mesh, spec)
    return tensor


def mark_gradients(model: nn.Module, mesh: Any, specs: Mapping[str, Spec]) -> None:
    """Lay every gradient out as its parameter, after the backward pass and before anything is run.

    Left alone, XLA splits gradients of whole vectors as suits it, and what is computed from them next follows.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            mark(parameter.grad, mesh, specs[name])


def check_layout(model: nn.Module, mesh: Any, specs: Mapping[str, Spec]) -> None:
    """Read back how parameters lie, and gradients where there are any; off torch_xla there is nothing to read.

    Raises:
        RuntimeError: some lie otherwise than `specs` say; all are named.
    """
    expected: dict[Spec, str] = {}
    wrong = []
    for name, tensor in _tensors(model):
        if tensor.device.type != "xla":
            continue
        spec = specs[name.removesuffix(".grad")]
        if spec not in expected:
            expected[spec] = layout_of(mark(tensor.new_zeros((1,) * len(spec)), mesh, spec))
        if layout_of(tensor) != expected[spec]:
            wrong.append(f"{name} lies as {layout_of(tensor) or 'nothing'}, not as {expected[spec]}, which {spec} is")
    if wrong:
        raise RuntimeError("parameters are not laid out as planned: " + "; ".join(wrong))


def layout_of(tensor: Tensor) -> str:
    """XLA's own words for how a torch_xla tensor is split; empty if it was never marked."""
    import torch_xla

    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def spec_lookup(model: nn.Module, specs: Mapping[str, Spec]) -> Callable[[Tensor], Spec]:
    """From a parameter of `model` to its spec, as `ShampooSharding` asks for it."""
    by_identity = {id(parameter): specs[name] for name, parameter in model.named_parameters()}
    return lambda parameter: by_identity[id(parameter)]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    return named + [(f"{name}.grad", tensor.grad) for name, tensor in named if tensor.grad is not None]
