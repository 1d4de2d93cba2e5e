"""Optimizers from a run's options.

Owns: which parameters decay, how options are named by each optimizer, state before the first step. Does not own: bounds
and defaults that do not depend on the optimizer (`config.OptimizerConfig`), the learning rate over time (`schedules`).
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dalle_torch.config import AdafactorConfig, OptimizerConfig, ShampooConfig
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo

Groups = list[dict[str, Any]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, **options: Any) -> torch.optim.Optimizer:
    """The optimizer `config.name` over the trained parameters, which it knows by their names in `model`.

    Args:
        options: arguments of the optimizer that hang on the devices (`parallel.engine.Engine.optimizer_options`).

    Raises:
        ValueError: an option is out of range for that optimizer.
    """
    builders: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": _adamw,
        "adafactor": _adafactor,
        "shampoo": _shampoo,
    }
    return builders[config.name](parameter_groups(model, config.weight_decay), config, **options)


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of all trained parameters that have none, as the first step would, without taking a step.

    Where steps are compiled a first step that creates state is another program than those after it.

    Raises:
        ValueError: torch's own class of the optimizer creates its state in a step alone (Adafactor).
    """
    if isinstance(optimizer, DistributedShampoo):
        optimizer.prepare()
        return
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ValueError(f"{type(optimizer).__name__} cannot be prepared for its first step: take adamw or shampoo")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state[parameter]:
                on_device = group["capturable"] or group["fused"]
                optimizer.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


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


def _adamw(groups: Groups, config: OptimizerConfig, **on_devices: Any) -> torch.optim.Optimizer:
    betas = (_or(config.beta1, 0.9), _or(config.beta2, 0.98))
    eps = _or(config.eps, 1e-8)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, **{"fused": True} | on_devices)


def _adafactor(groups: Groups, config: OptimizerConfig, **on_devices: Any) -> torch.optim.Optimizer:
    options = config.adafactor or AdafactorConfig()
    return torch.optim.Adafactor(
        groups,
        lr=config.lr,
        beta2_decay=options.beta2_decay,
        eps=(None, options.min_scale),
        d=options.clip_threshold,
        **on_devices,
    )


def _shampoo(groups: Groups, config: OptimizerConfig, **on_devices: Any) -> torch.optim.Optimizer:
    return DistributedShampoo(
        groups,
        lr=config.lr,
        beta1=_or(config.beta1, 0.9),
        beta2=_or(config.beta2, 0.999),
        diagonal_epsilon=_or(config.eps, 1e-10),
        **asdict(config.shampoo or ShampooConfig()),
        **on_devices,
    )
