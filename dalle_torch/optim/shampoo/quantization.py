"""Momenta in 8 bits.

Owns: int8 values with a float32 scale for each column. Does not own: which momenta are kept so (`preconditioner`).
"""

import torch
from torch import Tensor

LEVELS = 127
"""The largest absolute value of an int8 that has a negative."""


def quantize(stack: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [L, d0, ...] to int8 of that shape and scales, float32 [L, 1, ...].

    A scale belongs to the values that differ only in their place along d0; the largest of them becomes 127.
    """
    scales = stack.abs().amax(dim=1, keepdim=True) / LEVELS
    return (stack / torch.where(scales > 0, scales, 1.0)).round_().to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """float32 [L, d0, ...], a new tensor."""
    return values * scales
