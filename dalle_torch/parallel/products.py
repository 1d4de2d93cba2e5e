"""Products of attention whose rows and heads stay two dimensions, as a mesh that splits both needs them.

torch's batched product joins all leading dimensions in one. Of [B, H, ...] with B split over dp and H over mp the parts
of a device are not neighbours in [B x H, ...], so that XLA gathers all heads on every device, and each of them then
computes all heads. Here the product is one of XLA's own with two batch dimensions, and nothing is gathered.

Owns: the operation, for torch_xla alone, its gradients, telling a model of it. Does not own: attention, which has it
in its attribute `product`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op, register_autograd, register_fake, register_vmap


@custom_op("dalle_torch::product_of_heads", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    # torch_xla has a lowering of its own for this where nothing takes it apart before, as here, below autograd.
    return torch.einsum("bhsd,bhdk->bhsk", a, b)


@register_fake("dalle_torch::product_of_heads")
def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:3], b.shape[3])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _product(gradient, b.transpose(-1, -2)), _product(a.transpose(-1, -2), gradient)


register_autograd("dalle_torch::product_of_heads", _gradients, setup_context=_keep)


@register_vmap("dalle_torch::product_of_heads")
def _of_copies(info: Any, dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """The further dimension joins the rows', whose parts are neighbours in it."""
    copies = info.batch_size
    joined = [
        (x.movedim(dim, 0) if dim is not None else x.expand(copies, *x.shape)).flatten(0, 1)
        for x, dim in zip((a, b), dims, strict=True)
    ]
    return _product(*joined).unflatten(0, (copies, -1)), 0


def product_of_heads(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of [B, H, S, D] and [B, H, D, K], in the dtype of autocast where that is on: [B, H, S, K].

    float32 is multiplied by torch's product: torch_xla tells XLA of no precision for this one, and a TPU would multiply
    in bfloat16.
    """
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b = a.to(dtype), b.to(dtype)
    result: Tensor = a @ b if a.dtype == torch.float32 else _product(a, b)
    return result


def keep_heads_apart(model: nn.Module) -> None:
    """Have every attention of `model` multiply so: the modules that have a `product`."""
    for module in model.modules():
        if hasattr(module, "product"):
            module.product = product_of_heads  # type: ignore[assignment]
