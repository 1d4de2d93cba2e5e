"""One update of parameters of one shape, from their gradients to their new values.

Shapes: L parameters, stacked [L, *shape], or an equal part of each.
Owns: the order of an update. Does not own: state between updates (`bucket`), blocks (`preconditioner`), grafting.
Source: Anil et al., arXiv 2002.09018, as the trainer of DALL·E Mega ran it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.factors import Factor, Factors, average_, plus_scaled
from dalle_torch.optim.shampoo.grafting import TINY, clipped, grafting_update, norms, over
from dalle_torch.optim.shampoo.options import ShampooOptions
from dalle_torch.optim.shampoo.quantization import dequantize, quantize


@dataclass(frozen=True)
class Now:
    """What an update needs to know of its time.

    Attributes:
        factors: what the group's numbers are in this update.
        started: whether the preconditioned update is used; a bool tensor [] where both kinds share a graph.
        statistics_due: whether the statistics take the gradient in.
        roots_due: whether new preconditioners are taken after it.
    """

    factors: Factors
    started: bool | Tensor
    statistics_due: bool
    roots_due: bool


@dataclass(frozen=True)
class Run:
    """What goes through an update together.

    Attributes:
        parameters: L tensors, written to.
        gradient: float32 [L, *shape].
        norm: of each whole gradient, [L]; of no meaning where no option needs it.
        state: by name, [L, ...], written to.
    """

    parameters: list[Tensor]
    gradient: Tensor
    norm: Tensor
    state: dict[str, Tensor]


def without_nonfinite(run: Run, norm: Tensor) -> Run:
    """The run with gradients set to zero where `norm`, that of the whole gradient, is a NaN or infinite."""
    fine = norm.isfinite()
    # To read this costs nothing on a CPU; to go through the gradient does. Elsewhere it is the other way round.
    if fine.device.type == "cpu" and bool(fine.all()):
        return run
    gradient = torch.where(over(fine, run.gradient), run.gradient, 0.0)
    return Run(run.parameters, gradient, torch.where(fine, norm, 0.0), run.state)


def step(run: Run, options: ShampooOptions, now: Now, precondition: Callable[[Tensor], Tensor] | None) -> None:
    """Update the parameters and their state.

    Args:
        precondition: float32 gradient [L, *shape] to the preconditioned one, a new tensor; None: the grafting update
            is used alone.
    """
    factors = now.factors
    grafting = grafting_update(options, factors, run.gradient, run.norm, run.state.get("diagonal_statistics"))
    grafting = clipped(options, grafting)
    if not options.decoupled_learning_rate:
        grafting = grafting * factors.lr
    values = _values(run.parameters) if factors.decays else None
    if precondition is None:
        direction = _direction(run, options, factors, "momentum", grafting, values)
    else:
        shampoo = precondition(run.gradient)
        shampoo.mul_(over(norms(grafting) / (norms(shampoo) + TINY), shampoo))
        direction = _direction(run, options, factors, "momentum", shampoo, values)
        # From then on nothing reads the other momentum again.
        if now.started is not True:
            other = _direction(run, options, factors, "diagonal_momentum", grafting, values)
            direction = other if now.started is False else torch.where(now.started, direction, other)
    if values is not None and options.decoupled_weight_decay:
        direction = plus_scaled(direction, values, factors.weight_decay * factors.lr)
    _move(run.parameters, direction, factors.lr if options.decoupled_learning_rate else 1.0)


def step_in_one_pass(run: Run, options: ShampooOptions, now: Now) -> None:
    """`step` without preconditioner, compiled: each entry of the state is read and written once."""
    _compiled_step()(run, options, now, None)


@functools.cache
def _compiled_step() -> Callable[..., None]:
    return torch.compile(step, dynamic=True)


def _direction(
    run: Run, options: ShampooOptions, factors: Factors, name: str, update: Tensor, values: Tensor | None
) -> Tensor:
    """The update with coupled weight decay and momentum, whose state it renews."""
    if values is not None and not options.decoupled_weight_decay:
        update = plus_scaled(update, values, factors.weight_decay)
    kept, scale = run.state[name], run.state.get(f"{name}_scale")
    momentum = kept if scale is None else dequantize(kept, scale)
    average_(momentum, update, factors.beta1, factors.weight1)
    if scale is not None:
        for target, value in zip((kept, scale), quantize(momentum), strict=True):
            target.copy_(value)
    return update * factors.weight1 + momentum * factors.beta1 if options.nesterov else momentum


def _values(parameters: list[Tensor]) -> Tensor:
    return parameters[0].float().unsqueeze(0) if len(parameters) == 1 else torch.stack(parameters).float()


def _move(parameters: list[Tensor], direction: Tensor, lr: Factor) -> None:
    if isinstance(lr, Tensor):
        torch._foreach_sub_(parameters, list((direction * lr).unbind()))
    else:
        torch._foreach_add_(parameters, list(direction.unbind()), alpha=-lr)
