"""Optimizers from a run's options.

Owns: which parameters decay, how options are named by each optimizer, state before the first update. Does not own:
bounds and defaults that do not depend on the optimizer (`config.OptimizerConfig`), the learning rate over time
(`schedules`).
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dalle_torch.config import AdafactorConfig, OptimizerConfig, ShampooConfig
from dalle_torch.optim.adafactor import Adafactor
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo

Groups = list[dict[str, Any]]

MIXED = None
"""What a group's `decays` is where parameters that decay and others are together, since nothing decays."""


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, split_decay: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """The optimizer `config.name` over the trained parameters, which it knows by their names in `model`.

    Args:
        split_decay: group parameters by whether they decay even where the weight decay is 0.
        **options: what the devices want (`parallel.engine`), over those of `config`.

    Raises:
        ValueError: an option is out of range for that optimizer.
    """
    builders: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": _adamw,
        "adafactor": _adafactor,
        "shampoo": _shampoo,
    }
    groups = parameter_groups(model, config.weight_decay, split_decay or bool(config.weight_decay))
    return builders[config.name](groups, config, **options)


def parameter_groups(model: nn.Module, weight_decay: float, split: bool) -> Groups:
    """Trained parameters with their names: those that decay and those that do not.

    Tensors of two dimensions and more decay, embedded positions do not. Without decay there is one group, since Shampoo
    takes the roots of a group together and the size of the largest matters to the others.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not split:
        return [{"params": trained, "weight_decay": 0.0, "decays": MIXED}]
    decayed = [(name, p) for name, p in trained if p.ndim >= 2 and "embed_positions" not in name]
    free = [(name, p) for name, p in trained if p.ndim < 2 or "embed_positions" in name]
    groups: Groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": free, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def beta1_of(config: OptimizerConfig) -> float:
    """The option, or what null stands for."""
    return _or(config.beta1, 0.9)


def beta2_of(config: OptimizerConfig) -> float:
    """The option, or what null stands for."""
    return _or(config.beta2, 0.999 if config.name == "shampoo" else 0.98)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _adamw(groups: Groups, config: OptimizerConfig, **options: Any) -> torch.optim.Optimizer:
    betas = (beta1_of(config), beta2_of(config))
    eps = _or(config.eps, 1e-8)
    return torch.optim.AdamW(groups, **{"lr": config.lr, "betas": betas, "eps": eps, "fused": True} | options)


def _adafactor(groups: Groups, config: OptimizerConfig, **options: Any) -> torch.optim.Optimizer:
    own = config.adafactor or AdafactorConfig()
    kind = Adafactor if options.pop("capturable", False) else torch.optim.Adafactor
    return kind(
        groups,
        lr=config.lr,
        beta2_decay=own.beta2_decay,
        eps=(None, own.min_scale),
        d=own.clip_threshold,
        **options,
    )


def _shampoo(groups: Groups, config: OptimizerConfig, **options: Any) -> torch.optim.Optimizer:
    return DistributedShampoo(
        groups,
        lr=config.lr,
        beta1=beta1_of(config),
        beta2=beta2_of(config),
        diagonal_epsilon=_or(config.eps, 1e-10),
        **asdict(config.shampoo or ShampooConfig()) | options,
    )


@torch.no_grad()
def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of every parameter, as the first update would, and change nothing else.

    A state that is loaded finds its place then, and where steps are compiled the first one equals the others.
    """
    if isinstance(optimizer, (DistributedShampoo, Adafactor)):
        optimizer.prepare()
    elif isinstance(optimizer, torch.optim.AdamW):
        _prepare_adamw(optimizer)
    else:
        _prepare_by_step(optimizer)


def _prepare_adamw(optimizer: torch.optim.AdamW) -> None:
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def _prepare_by_step(optimizer: torch.optim.Optimizer) -> None:
    """For optimizers that make their state in a step alone: one by nothing at no rate, which leaves parameters and
    moments as they were, to the bit."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
        optimizer.state[parameter]["step"].zero_()
