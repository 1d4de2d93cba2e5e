"""Optimizers from a run's options.

Owns: which parameters decay, how options are named by each optimizer. Does not own: bounds and defaults that do not
depend on the optimizer (`config.OptimizerConfig`), the learning rate over time (`schedules`).
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dalle_torch.config import AdafactorConfig, OptimizerConfig, ShampooConfig
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo

Groups = list[dict[str, Any]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer `config.name` over the trained parameters, which it knows by their names in `model`.

    Raises:
        ValueError: an option is out of range for that optimizer.
    """
    builders: dict[str, Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]] = {
        "adamw": _adamw,
        "adafactor": _adafactor,
        "shampoo": _shampoo,
    }
    return builders[config.name](parameter_groups(model, config.weight_decay), config)


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Trained parameters with their names: those that decay and those that do not.

    Tensors of two dimensions and more decay, embedded positions do not. Without decay there is one group, since Shampoo
    takes the roots of a group together and the size of the largest matters to the others.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    decayed = [(name, p) for name, p in trained if p.ndim >= 2 and "embed_positions" not in name]
    free = [(name, p) for name, p in trained if p.ndim < 2 or "embed_positions" in name]
    groups: Groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    betas = (_or(config.beta1, 0.9), _or(config.beta2, 0.98))
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=_or(config.eps, 1e-8), fused=True)


def _adafactor(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    options = config.adafactor or AdafactorConfig()
    return torch.optim.Adafactor(
        groups,
        lr=config.lr,
        beta2_decay=options.beta2_decay,
        eps=(None, options.min_scale),
        d=options.clip_threshold,
    )


def _shampoo(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return DistributedShampoo(
        groups,
        lr=config.lr,
        beta1=_or(config.beta1, 0.9),
        beta2=_or(config.beta2, 0.999),
        diagonal_epsilon=_or(config.eps, 1e-10),
        **asdict(config.shampoo or ShampooConfig()),
    )
