"""The learning rate over time.

Owns: the rate of an update as a function of its number, and of what evaluations have shown so far. Does not own: the
options (`config.OptimizerConfig`), when evaluations take place (`training`).
"""

import math
from dataclasses import dataclass, replace

from dalle_torch.config import OptimizerConfig, PlateauConfig


@dataclass(frozen=True)
class PlateauState:
    """What the schedule "plateau" has seen of the evaluation's losses.

    Attributes:
        best: the lowest loss; None before the first one.
        stalled: evaluations in a row since then, or since the last reduction, that were not better.
        reductions: how often the learning rate was lowered.
    """

    best: float | None = None
    stalled: int = 0
    reductions: int = 0


def learning_rate(config: OptimizerConfig, step: int, steps: int, plateau: PlateauState | None = None) -> float:
    """Learning rate of update `step`, counted from 0, in a run of `steps` updates.

    Zero for `offset_steps` updates, then a line from zero that would be at `lr` after `warmup_steps + 1` more, as the
    trainer of DALL·E Mega had it; from update `offset_steps + warmup_steps` on the schedule, which starts at `lr`.

    Args:
        plateau: what `observe` made of the evaluations so far; only the schedule "plateau" looks at it.
    """
    warm = step - config.offset_steps
    if warm < 0:
        return 0.0
    if warm < config.warmup_steps:
        return config.lr * warm / (config.warmup_steps + 1)
    passed = warm - config.warmup_steps
    if config.schedule in ("exponential", "plateau"):
        lowest = min(config.lr, config.final_lr)
        return max(lowest, config.lr * _factor(config, passed, plateau or PlateauState()))
    done = min(1.0, passed / max(1, steps - config.offset_steps - config.warmup_steps))
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.final_lr + (config.lr - config.final_lr) * share


def _factor(config: OptimizerConfig, passed: int, plateau: PlateauState) -> float:
    if config.schedule == "plateau":
        return (config.plateau or PlateauConfig()).factor ** plateau.reductions
    assert config.exponential is not None
    exponent = passed / config.exponential.transition_steps
    return config.exponential.decay_rate ** (math.floor(exponent) if config.exponential.staircase else exponent)


def observe(config: OptimizerConfig, plateau: PlateauState, step: int, loss: float) -> PlateauState:
    """The state after an evaluation that found `loss` when `step` updates were done.

    Nothing changes with other schedules, nor before the warm-up is over. A loss that is not a number is not better.
    """
    if config.schedule != "plateau" or step <= config.offset_steps + config.warmup_steps:
        return plateau
    options = config.plateau or PlateauConfig()
    if math.isfinite(loss) and (plateau.best is None or loss < plateau.best - options.threshold * abs(plateau.best)):
        return replace(plateau, best=loss, stalled=0)
    if plateau.stalled < options.patience:
        return replace(plateau, stalled=plateau.stalled + 1)
    return replace(plateau, stalled=0, reductions=plateau.reductions + 1)
