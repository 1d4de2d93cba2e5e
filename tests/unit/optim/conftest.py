"""Small models whose parameters are of every kind, and gradients for them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_torch.optim import DistributedShampoo

SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "block_size": 4,
    "merge_small_dims_block_size": 8,
    "skip_preconditioning_dim_size_gt": 12,
    "start_preconditioning_step": 3,
    "preconditioning_compute_steps": 2,
}
"""Blocks, leftovers, a skipped parameter and the start within a few steps."""


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    """Two of one shape, a leftover in each dimension, a skipped one, a vector, a scalar, a kernel, one of one entry."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 6), "b": (8, 6), "odd": (5, 7), "wide": (3, 20), "bias": (6,), "scalar": (),
              "kernel": (4, 3, 3, 3), "one": (1, 1)}  # fmt: skip
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def give_gradients(named: Iterable[nn.Parameter], step: int) -> None:
    """Gradients that depend on nothing but the step, and have a direction that stays."""
    for index, parameter in enumerate(named):
        generator = torch.Generator().manual_seed(1000 * step + index)
        steady = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        gradient = steady + torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype).to(parameter.device)


def train(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(named.values(), step)
        optimizer.step()


def values(named: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in named.values()])


@pytest.fixture
def make() -> Callable[..., tuple[dict[str, nn.Parameter], DistributedShampoo]]:
    def make(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[dict[str, nn.Parameter], DistributedShampoo]:
        named = parameters(dtype)
        return named, DistributedShampoo(named.items(), **SETTINGS | settings)

    return make
