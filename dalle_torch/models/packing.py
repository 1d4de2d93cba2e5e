"""Weights rearranged for drawing on a CPU: the same products, read faster, or stored in 8 bits.

A decoding step multiplies a few rows by every weight, so its time is that of reading the weights. oneDNN's blocked
layout reads them about twice as fast as a plain matrix there, for as little memory, since the plain ones are let go.
Owns: the packed layers and where they go. Does not own: the decoder, when to pack (`pipeline`).
"""

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Quantization = Literal["int8"]

_LARGEST_INT8 = 127
_KERNEL_WIDTH = 64
"""torch's 8-bit product reads this many inputs at a time, and past the end of a row of any other length."""


class _DrawingLinear(nn.Module):
    """A linear layer without gradient, tied to the CPU, in a layout of its own; it cannot be saved or moved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise ValueError(
                f"a model packed for drawing on the CPU cannot become {moved.dtype} on {moved.device}: load it again"
            )
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        raise ValueError(f"{prefix[:-1]} is packed for drawing and holds no weights to save: load the model again")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BlockedLinear(_DrawingLinear):
    """float32 weights in oneDNN's blocked layout; equal to `nn.Linear` but for the order of its sums."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32."""
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")


class Int8Linear(_DrawingLinear):
    """8-bit weights with one float scale a row of the output; inputs are rounded to bfloat16, sums are float32.

    Symmetric and to the nearest: a row's largest weight becomes 127.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST_INT8
        self.padding = -self.in_features % _KERNEL_WIDTH
        self.codes = F.pad((weight / scales[:, None]).round_().to(torch.int8), (0, self.padding))
        self.scales = scales
        self.unit_scales = torch.ones_like(scales, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32."""
        rows = F.pad(x.reshape(-1, self.in_features).bfloat16(), (0, self.padding))
        product = torch._weight_int8pack_mm(rows, self.codes, self.unit_scales).float() * self.scales
        product = product if self.bias is None else product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def can_pack(model: nn.Module) -> bool:
    """Whether this machine has the layouts, and the model is of a kind they serve: float32 on the CPU."""
    weight = model.lm_head.weight if isinstance(model.lm_head, nn.Linear) else None
    return (
        torch.backends.mkldnn.is_available()
        and weight is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


@torch.no_grad()
def pack_for_drawing(model: nn.Module, quantize: Quantization | None = None) -> nn.Module:
    """Replace the linear layers that every decoding step of a `DalleBart` uses, in place.

    The encoder, and the projections that run once a prompt, stay as they are. Afterwards the model draws, but cannot
    be trained, saved, or moved from the CPU.

    Args:
        model: a `DalleBart` in float32 on the CPU.
        quantize: None keeps float32; "int8" stores weights in 8 bits, for about 1.5 times the speed of one picture.

    Raises:
        ValueError: the model is elsewhere, of another dtype, or packed already, or this build lacks oneDNN.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is not known: use 'int8', or None for float32")
    if not can_pack(model):
        raise ValueError(
            f"only a float32 model on the CPU can be packed for drawing, once (this one is {model.dtype} on "
            f"{model.device}, {'already packed' if not isinstance(model.lm_head, nn.Linear) else 'not packed'})"
        )
    kind = BlockedLinear if quantize is None else Int8Linear
    for name in _step_layers(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        # One layer at a time, so that no more than one weight is ever there twice.
        setattr(parent, name.rpartition(".")[2], kind(getattr(parent, name.rpartition(".")[2])))
    return model.eval()


def _step_layers(model: nn.Module) -> list[str]:
    once_a_prompt = ("cross_attn.k_proj", "cross_attn.v_proj")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [
        name
        for name in names
        if name == "lm_head" or (name.startswith("decoder.") and not name.endswith(once_a_prompt))
    ]
