"""An optimizer and its learning rate over time."""

from dataclasses import dataclass
from typing import Literal

from dalle_torch.config.checks import below, not_above, not_finite, refuse


@dataclass(frozen=True, kw_only=True)
class ShampooConfig:
    """What Shampoo has beside the options of all optimizers; `optim.DistributedShampoo` explains each."""

    block_size: int = 1024
    preconditioning_compute_steps: int = 10
    statistics_compute_steps: int = 1
    start_preconditioning_step: int | None = None
    matrix_epsilon: float = 1e-6
    inverse_failure_threshold: float = 0.1
    graft_type: Literal["sgd", "sqrt_n", "rmsprop", "rmsprop_normalized", "adagrad", "adagrad_normalized"] = (
        "rmsprop_normalized"
    )
    clip_by_scaled_gradient_norm: float | None = None
    exponent_override: int = 0
    best_effort_shape_interpretation: bool = True
    merge_small_dims_block_size: int = 4096
    skip_preconditioning_dim_size_gt: int = 4096
    nesterov: bool = False
    moving_average_for_momentum: bool = True
    best_effort_memory_usage_reduction: bool = False
    decoupled_learning_rate: bool = True
    decoupled_weight_decay: bool = False
    root_method: Literal["auto", "newton", "eigh"] = "auto"
    skip_nonfinite_gradients: bool = True
    compile: bool = False
    """Parameters that are not preconditioned are updated by compiled code: slow to start, then a third of the time."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "block_size", "preconditioning_compute_steps", "statistics_compute_steps")
        problems += below(self, 1, "merge_small_dims_block_size")
        problems += below(self, 0, "exponent_override", "skip_preconditioning_dim_size_gt")
        if self.start_preconditioning_step is not None:
            problems += below(self, 0, "start_preconditioning_step")
        problems += not_above(self, 0, "matrix_epsilon", "inverse_failure_threshold", "clip_by_scaled_gradient_norm")
        refuse("shampoo", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """What Adafactor (arXiv 1804.04235), as torch does it, has beside the options of all optimizers."""

    beta2_decay: float = -0.8
    """At update t, counted from 1, the moments take in a share t^beta2_decay of the new gradient's squares."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update, before the learning rate."""
    min_scale: float = 1e-3
    """Updates are relative to a parameter's root mean square, or to this where that is smaller."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "clip_threshold") + below(self, 0, "min_scale")
        if self.beta2_decay > 0:
            problems.append(f"beta2_decay={self.beta2_decay} must be at most 0")
        refuse("adafactor", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class ExponentialConfig:
    """A learning rate that is multiplied by `decay_rate` once in `transition_steps` updates."""

    decay_rate: float
    transition_steps: int
    staircase: bool = False
    """Multiply at the end of each `transition_steps`, not a little every update."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "transition_steps")
        if not 0 < self.decay_rate <= 1:
            problems.append(f"decay_rate={self.decay_rate} must lie in (0, 1]")
        refuse("exponential", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """A learning rate that is multiplied by `factor` when the evaluation's loss stalls."""

    factor: float = 0.5
    patience: int = 1
    """Evaluations in a row that may pass without a better loss; the next one lowers the rate."""
    threshold: float = 1e-3
    """Share by which a loss has to be below the best so far to be better."""

    def __post_init__(self) -> None:
        problems = below(self, 0, "patience")
        problems += [] if 0 < self.factor < 1 else [f"factor={self.factor} must lie in (0, 1)"]
        problems += [] if 0 <= self.threshold < 1 else [f"threshold={self.threshold} must lie in [0, 1)"]
        refuse("plateau", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer, its learning rate over time, and gradient clipping; what would have no effect is refused."""

    name: Literal["adamw", "adafactor", "shampoo"] = "adamw"
    """AdamW (arXiv 1711.05101), Adafactor (arXiv 1804.04235) or Distributed Shampoo (arXiv 2002.09018)."""
    lr: float = 1e-3
    """Highest learning rate, at the end of the warm-up. Adafactor's is relative to the size of each parameter."""
    offset_steps: int = 0
    """First updates, with a learning rate of zero: they fill the optimizer's moments."""
    warmup_steps: int = 100
    """Updates after those in which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine", "exponential", "plateau"] = "cosine"
    """What follows: linear and cosine reach `final_lr` at the last step, the next two have options of their own."""
    final_lr: float = 0.0
    """Lowest learning rate after the warm-up."""
    exponential: ExponentialConfig | None = None
    plateau: PlateauConfig | None = None
    """null: its defaults."""
    beta1: float | None = None
    """null: 0.9."""
    beta2: float | None = None
    """null: 0.98 for adamw, 0.999 for shampoo."""
    eps: float | None = None
    """Added to the root that is divided by. null: 1e-8 for adamw, 1e-10 for shampoo."""
    weight_decay: float = 0.0
    """On matrices and kernels alone; norms, biases and embeddings of positions are left free."""
    max_grad_norm: float | None = 1.0
    """Gradients whose norm is larger are scaled down to it; null: never."""
    adafactor: AdafactorConfig | None = None
    shampoo: ShampooConfig | None = None
    """null: their defaults."""

    def __post_init__(self) -> None:
        problems = below(self, 0, "lr", "final_lr", "offset_steps", "warmup_steps", "weight_decay")
        if self.eps is not None:
            problems += below(self, 0, "eps")
        problems += not_above(self, 0, "max_grad_norm")
        problems += [*self._moments(), *self._without_effect()]
        if self.schedule == "exponential" and self.exponential is None:
            problems.append("schedule=exponential needs decay_rate and transition_steps: set exponential.*")
        refuse("optimizer", not_finite(self) + problems)

    def _moments(self) -> list[str]:
        problems = []
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            problems.append(f"beta1={self.beta1} must lie in [0, 1)")
        if self.beta2 is not None:
            if self.name == "shampoo" and not 0 < self.beta2 <= 1:
                problems.append(f"beta2={self.beta2} must lie in (0, 1]")
            if self.name != "shampoo" and not 0 <= self.beta2 < 1:
                problems.append(f"beta2={self.beta2} must lie in [0, 1)")
        return problems

    def _without_effect(self) -> list[str]:
        unused = {
            "name": [name for name in ("adafactor", "shampoo") if name != self.name],
            "schedule": [name for name in ("exponential", "plateau") if name != self.schedule],
        }
        if self.name == "adafactor":
            unused["name"] += ["beta1", "beta2", "eps"]
        problems = [
            f"{option} has no effect with {choice}={getattr(self, choice)}: leave it out"
            for choice, options in unused.items()
            for option in options
            if getattr(self, option) is not None
        ]
        if self.schedule == "constant" and self.final_lr:
            problems.append("final_lr has no effect with schedule=constant: leave it out")
        return problems
