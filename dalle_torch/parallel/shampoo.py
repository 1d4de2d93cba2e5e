"""Distributed Shampoo's state on a mesh of torch_xla devices.

Owns: which axes of the mesh matrices are split over, while they are kept and while their roots are taken. Does not own:
the optimizer, which knows this only by its methods; how parameters are sharded.

On a TPU call `torch_xla.backends.set_mat_mul_precision("highest")` before training: products in bfloat16 are not enough
for roots.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, Literal

from torch import Tensor

PartitionSpec = tuple[Any, ...]
"""For each dimension of a tensor the mesh axis that it is split over, several of them, or None."""


class ShampooSharding:
    """Matrices split over the data-parallel axis, their roots over all axes, momenta as the parameters.

    Args:
        mesh: a `torch_xla.distributed.spmd.Mesh` with named axes.
        spec_of: how each parameter is split; None: parameters are replicated.
        axis: the axis that matrices are kept split over.
    """

    def __init__(self, mesh: Any, spec_of: Callable[[Tensor], PartitionSpec] | None = None, axis: str = "dp") -> None:
        if axis not in mesh.axis_names:
            raise ValueError(f"axis={axis!r} is not one of the mesh's: {', '.join(mesh.axis_names)}")
        self.mesh = mesh
        self.spec_of = spec_of or (lambda parameter: (None,) * parameter.ndim)
        self.axis = axis
        # Roots are spread over every device, so the stacks are to divide evenly among all.
        self.shards = math.prod(mesh.shape().values())

    def constrain(self, tensor: Tensor, layout: Literal["blocks", "roots", "whole"] | Tensor) -> Tensor:
        """Mark `tensor` in place: as split along dimension 0, as whole, or, for state of parameters, as they are."""
        from torch_xla.distributed import spmd

        if isinstance(layout, Tensor):
            spec: PartitionSpec = (None, *self.spec_of(layout))
        else:
            axes = {"blocks": self.axis, "roots": tuple(self.mesh.axis_names), "whole": None}
            spec = (axes[layout], *(None,) * (tensor.ndim - 1))
        spmd.mark_sharding(tensor, self.mesh, spec)
        return tensor

    def layout_of(self, parameter: Tensor) -> Hashable:
        """How the parameter is split."""
        return self.spec_of(parameter)
