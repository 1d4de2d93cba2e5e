"""The settings of Distributed Shampoo: their names, defaults and bounds.

Owns: `ShampooOptions`, one parameter group's settings. Does not own: what they do (`preconditioner`, `grafting`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import Tensor

from dalle_torch.optim.shampoo.group import BETAS

GraftType = Literal["sgd", "sqrt_n", "rmsprop", "rmsprop_normalized", "adagrad", "adagrad_normalized"]
RootMethod = Literal["auto", "newton", "eigh"]

TAKEN_OVER = frozenset({
    "lr", "weight_decay", "beta1", "beta2",
    "preconditioning_compute_steps", "statistics_compute_steps", "start_preconditioning_step",
})  # fmt: skip
"""What may change while a run goes on, without another program on torch_xla; a loaded state brings its own."""
ADJUSTABLE = TAKEN_OVER | {"root_method", "skip_nonfinite_gradients"}
"""What a saved state may differ in from the optimizer that loads it."""
STRUCTURAL = (
    "block_size", "merge_small_dims_block_size", "skip_preconditioning_dim_size_gt",
    "best_effort_shape_interpretation", "best_effort_memory_usage_reduction", "graft_type",
)  # fmt: skip
"""What decides which tensors the state is made of, so that it cannot change once there is state."""


@dataclass(frozen=True, kw_only=True)
class ShampooOptions:
    """The settings of one parameter group; `DistributedShampoo` explains them."""

    lr: float | Tensor = 1e-3
    block_size: int = 1024
    beta1: float = 0.9
    beta2: float = 0.999
    diagonal_epsilon: float = 1e-10
    matrix_epsilon: float = 1e-6
    weight_decay: float = 0.0
    start_preconditioning_step: int = 101
    preconditioning_compute_steps: int = 10
    statistics_compute_steps: int = 1
    best_effort_shape_interpretation: bool = True
    graft_type: GraftType = "rmsprop_normalized"
    nesterov: bool = False
    exponent_override: int = 0
    inverse_failure_threshold: float = 0.1
    moving_average_for_momentum: bool = True
    skip_preconditioning_dim_size_gt: int = 4096
    merge_small_dims_block_size: int = 4096
    clip_by_scaled_gradient_norm: float | None = None
    best_effort_memory_usage_reduction: bool = False
    decoupled_learning_rate: bool = True
    decoupled_weight_decay: bool = False
    root_method: RootMethod = "auto"
    skip_nonfinite_gradients: bool = True

    def __post_init__(self) -> None:
        problems = [*self._numbers(), *self._choices()]
        if problems:
            raise ValueError("Shampoo cannot be used with " + "; ".join(problems))

    def _numbers(self) -> list[str]:
        problems = []
        if isinstance(self.lr, Tensor):
            # Its value stays on its device: reading it would wait for that.
            if self.lr.numel() != 1:
                problems.append(f"lr of shape {list(self.lr.shape)}: give a number or a tensor of one")
        elif isinstance(self.lr, bool) or not isinstance(self.lr, Real):
            problems.append(f"lr={self.lr!r}, which must be a number")
        elif not (math.isfinite(float(self.lr)) and float(self.lr) >= 0):
            problems.append(f"lr={self.lr}, which must be at least 0 and finite")
        for names, allowed, bound in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                whole = isinstance(getattr(ShampooOptions, name), int)
                if value is None and name == "clip_by_scaled_gradient_norm":
                    continue
                if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
                    problems.append(f"{name}={value!r}, which must be {'a whole number' if whole else 'a number'}")
                elif not allowed(value):
                    problems.append(f"{name}={value}, which must {bound}")
        return problems

    def _choices(self) -> list[str]:
        problems = []
        for name, allowed in (("graft_type", GraftType), ("root_method", RootMethod)):
            if getattr(self, name) not in get_args(allowed):
                problems.append(f"{name}={getattr(self, name)!r}, which must be one of {', '.join(get_args(allowed))}")
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                problems.append(f"{field.name}={getattr(self, field.name)!r}, which must be true or false")
        return problems

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> "ShampooOptions":
        """The settings in a parameter group, checked.

        Raises:
            ValueError: settings are out of range; all are named.
        """
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"Shampoo cannot be used with betas={betas!r}, which must be two numbers")
        others = {field.name: group[field.name] for field in fields(cls) if field.name not in BETAS}
        return cls(**dict(zip(BETAS, betas, strict=True)), **others)


_BOUNDS = (
    (("exponent_override",), lambda value: 0 <= value <= 64, "lie in [0, 64]"),
    (("beta1",), lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("beta2",), lambda value: 0 < value <= 1, "lie in (0, 1]; 1 adds up without forgetting"),
    (("diagonal_epsilon", "weight_decay"), lambda value: 0 <= value < math.inf, "be at least 0"),
    (
        ("matrix_epsilon", "inverse_failure_threshold", "clip_by_scaled_gradient_norm"),
        lambda value: 0 < value < math.inf,
        "be above 0",
    ),
    (
        ("block_size", "preconditioning_compute_steps", "statistics_compute_steps", "merge_small_dims_block_size"),
        lambda value: value >= 1,
        "be at least 1",
    ),
    (
        ("start_preconditioning_step", "skip_preconditioning_dim_size_gt"),
        lambda value: value >= 0,
        "be at least 0",
    ),
)
