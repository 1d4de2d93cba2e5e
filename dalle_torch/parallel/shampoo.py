"""Distributed Shampoo's state on a mesh of torch_xla devices.

Owns: how matrices, momenta and what lies between them are marked. Does not own: the optimizer, which knows this only by
its methods; how parameters are sharded; how blocks change devices (`blocks`).

On a TPU call `torch_xla.backends.set_mat_mul_precision("highest")` before training: products in bfloat16 are not enough
for roots.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from dalle_torch.parallel.blocks import Exchange, Region, plan_exchange
from dalle_torch.parallel.mesh import AXES

PartitionSpec = tuple[Any, ...]
"""For each dimension of a tensor the mesh axis that it is split over, several of them, or None."""

# torch_xla marks five dimensions at most.
_BEFORE: PartitionSpec = ("dp", "kept", "exchanged", None, None)
_AFTER: PartitionSpec = ("dp", "kept", None, "exchanged", None)


class ShampooSharding:
    """Matrices and their roots split over all devices, momenta as the parameters.

    Args:
        mesh: a `torch_xla.distributed.spmd.Mesh` of the axes dp and mp.
        spec_of: how each parameter is split; None: parameters are replicated.

    Raises:
        ValueError: the mesh has other axes.
    """

    def __init__(self, mesh: Any, spec_of: Callable[[Tensor], PartitionSpec] | None = None) -> None:
        if tuple(mesh.axis_names) != AXES:
            raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}: give one of {', '.join(AXES)}")
        self.mesh = mesh
        self.spec_of = spec_of or (lambda parameter: (None,) * parameter.ndim)
        # Every device takes as many roots as any other.
        self.shards = math.prod(mesh.shape().values())
        self._meshes: dict[int, Any] = {}

    def constrain(self, tensor: Tensor, layout: Literal["blocks", "whole"] | Tensor) -> Tensor:
        """Mark `tensor` in place: as split along dimension 0, as whole, or, for state of parameters, as they are."""
        from torch_xla.distributed import spmd

        if isinstance(layout, Tensor):
            spec: PartitionSpec = (None, *self.spec_of(layout))
        else:
            spec = ({"blocks": AXES, "whole": None}[layout], *(None,) * (tensor.ndim - 1))
        spmd.mark_sharding(tensor, self.mesh, spec)
        return tensor

    def layout_of(self, parameter: Tensor) -> Hashable:
        """How the parameter is split."""
        return self.spec_of(parameter)

    def cut(self, region: Region, stack: Tensor, count: int, like: Tensor) -> Tensor:
        """[L, *shape] to [count, *sizes], each device's own blocks."""
        exchange = self._exchange(region, stack, count, like)
        if exchange is None:
            return self.constrain(_filled_up(region.cut(stack), count), "blocks")
        spread = exchange.rewrite(_filled_up(stack, exchange.filled), exchange.parts, exchange.spread)
        # Every copy has all of them, so that to look at a part of them costs nothing.
        spread = self._lay(spread, (None, "mp", None), ("dp", "mp", None))
        apart = exchange.rewrite(spread, exchange.spread, exchange.apart)
        apart = self._lay(apart, _BEFORE, _AFTER, exchange=exchange)
        joined = exchange.rewrite(apart, exchange.apart, exchange.gathered)
        return self.constrain(exchange.rewrite(joined, exchange.joined, exchange.blocks), "blocks")

    def paste(self, region: Region, blocks: Tensor, stack: Tensor, like: Tensor) -> None:
        """Write [count, *sizes], of each device its own, to where `cut` takes them from, on all copies."""
        exchange = self._exchange(region, stack, len(blocks), like)
        if exchange is None:
            region.paste(blocks[: len(stack) * region.blocks], stack)
            return
        joined = exchange.rewrite(blocks, exchange.blocks, exchange.joined)
        apart = exchange.rewrite(joined, exchange.gathered, exchange.apart)
        apart = self._lay(apart, _AFTER, _BEFORE, exchange=exchange)
        spread = exchange.rewrite(apart, exchange.apart, exchange.spread)
        spread = self._lay(spread, ("dp", "mp", None), (None, "mp", None))
        stack.copy_(exchange.rewrite(spread, exchange.spread, exchange.parts)[: len(stack)])

    def _exchange(self, region: Region, stack: Tensor, count: int, like: Tensor) -> Exchange | None:
        shape, spec = tuple(stack.shape[1:]), self.spec_of(like)
        if shape != tuple(like.shape):
            return None
        sizes = self.mesh.shape()
        return plan_exchange(shape, region, spec, count, sizes["dp"], sizes["mp"])

    def _lay(self, tensor: Tensor, *specs: PartitionSpec, exchange: Exchange | None = None) -> Tensor:
        """`tensor` on its way through several layouts, each of which is a node of its own in the program."""
        from torch_xla.distributed import spmd

        for spec in specs:
            mesh = self.mesh if exchange is None else self._refined(exchange)
            spmd.annotate_custom_sharding(tensor, mesh, spec)
        return tensor

    def _refined(self, exchange: Exchange) -> Any:
        """The mesh with mp in two axes."""
        from torch_xla.distributed import spmd

        if exchange.kept not in self._meshes:
            sizes = (self.mesh.shape()["dp"], exchange.kept, exchange.exchanged)
            self._meshes[exchange.kept] = spmd.Mesh(self.mesh.device_ids, sizes, ("dp", "kept", "exchanged"))
        return self._meshes[exchange.kept]


def _filled_up(stack: Tensor, count: int) -> Tensor:
    """`stack` [N, ...] with zeros behind it, [count, ...]."""
    filling = count - len(stack)
    return torch.cat([stack, stack.new_zeros(filling, *stack.shape[1:])]) if filling else stack
