"""The dense layer of the model: `nn.Linear`, whose large float32 products on an x86 CPU are oneDNN's.

Most of a training step is these products. Owns: their gradients, when they pay in a layer. Does not own: the product
(`products`), weights rearranged for drawing (`packing`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_torch.products import available, product

_LEAST_ROWS = 64
"""Below it oneDNN gains nothing on small matrices, since it rearranges the weight in every call."""


class _Product(torch.autograd.Function):
    """a [N, K] times the transpose of b [M, K], float32: [N, M]. Its gradients are such products again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gradient = gradients[0].contiguous()
        a, b = ctx.saved_tensors
        of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_a = _Product.apply(gradient, b.T)
        if ctx.needs_input_grad[1]:
            # The first factor is copied where it is transposed: let it be the smaller one.
            if gradient.shape[1] > a.shape[1]:
                of_b = _Product.apply(a.T, gradient.T).T.contiguous()
            else:
                of_b = _Product.apply(gradient.T, a.T)
        return of_a, of_b


class Linear(nn.Linear):
    """`nn.Linear` in everything but the order in which some of its sums are taken.

    `torch.backends.mkldnn.flags(enabled=False)` switches back to torch's own product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not _pays(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        result: Tensor = _Product.apply(x.flatten(0, -2).contiguous(), self.weight)
        result = result.view(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is oneDNN's: plain float32 tensors on an x86 CPU, and many rows."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and x.shape[:-1].numel() >= _LEAST_ROWS
        and weight.device.type == "cpu"
        # A weight that is spread over devices, or of another kind, has no such product.
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and available()
    )
