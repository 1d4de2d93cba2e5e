"""Settings of an optimizer that change while it runs, and the counts that it keeps.

Owns: which options of a run go where in parameter groups. Does not own: when they change (`training`), making
optimizers (`build`).
"""

from typing import Any

import torch

from dalle_torch.config import OptimizerConfig, ShampooConfig
from dalle_torch.optim.build import MIXED, beta1_of, beta2_of
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo


def adjust(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> bool:
    """Set weight decay, betas and, of Shampoo, the intervals, as `config` says; the state stays.

    The learning rate is set by every update anyway.

    Returns:
        False if parameters that are to decay and others are in one group, as when nothing decayed before: then nothing
        was changed, and the optimizer has to be made anew, and given the old state.
    """
    if config.weight_decay and any(group["decays"] is MIXED for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
        for name, value in _moments(config).items():
            group[name] = value
    return True


def _moments(config: OptimizerConfig) -> dict[str, Any]:
    if config.name == "adamw":
        return {"betas": (beta1_of(config), beta2_of(config))}
    if config.name == "adafactor":
        return {}
    shampoo = config.shampoo or ShampooConfig()
    return {
        "beta1": beta1_of(config),
        "beta2": beta2_of(config),
        "preconditioning_compute_steps": shampoo.preconditioning_compute_steps,
        "statistics_compute_steps": shampoo.statistics_compute_steps,
    }


def counters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What Shampoo counts (`DistributedShampoo.counts`); empty for others. Waits for the device."""
    if not isinstance(optimizer, DistributedShampoo):
        return {}
    return {name: float(count) for name, count in optimizer.counts().items()}
