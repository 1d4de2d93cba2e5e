"""Adafactor as torch does it, with nothing read back from the device.

Owns: the update of `torch.optim.Adafactor` (arXiv 1804.04235) in tensors alone. Does not own: its options, which are
torch's.

torch's class reads the count of steps and the norms of each parameter and of its update as numbers. On torch_xla every
number is a wait in the middle of the step, and another program. Here they stay tensors: on one mesh all steps are one
program.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Adafactor(torch.optim.Adafactor):
    """`torch.optim.Adafactor` whose counts of steps are on the parameters' device, as is a learning rate that is a
    tensor []. Its state has torch's names and shapes, and goes from one class to the other."""

    def prepare(self) -> None:
        """Create the state of every parameter, as a first update would."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter].update(_fresh(parameter))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of the parameters that have gradients; there is no closure here."""
        if closure is not None:
            raise ValueError("closure is not taken here: compute the gradients before step()")
        self.prepare()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)


def _fresh(parameter: nn.Parameter) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    shape = list(parameter.shape)
    if len(shape) < 2:
        return state | {"variance": parameter.new_zeros(shape)}
    return state | {
        "row_var": parameter.new_zeros([*shape[:-1], 1]),
        "col_var": parameter.new_zeros([*shape[:-2], 1, shape[-1]]),
    }


def _update(parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    gradient, rate = parameter.grad, group["lr"]
    assert gradient is not None
    least, smallest_scale = group["eps"]
    if least is None:
        least = torch.finfo(parameter.dtype).eps
    step = state["step"].add_(1)
    share = step ** group["beta2_decay"]
    relative = torch.minimum(step.rsqrt(), torch.as_tensor(rate, dtype=step.dtype, device=step.device))
    scale = _root_mean_square(parameter).clamp(min=smallest_scale) * relative
    if group["weight_decay"]:
        parameter.mul_(1 - rate * group["weight_decay"])
    update = _estimate(gradient, state, share, least).clamp_(min=least * least).rsqrt_().mul_(gradient)
    excess = (_root_mean_square(update) / group["d"]).clamp(min=1.0)
    parameter.sub_(update * (scale / excess))


def _estimate(gradient: Tensor, state: dict[str, Tensor], share: Tensor, least: float) -> Tensor:
    """The second moments: of a matrix the product of those of its rows and columns."""
    squares = gradient.square()
    if gradient.ndim < 2:
        return _mix(state["variance"], squares, share).clone()
    rows = _mix(state["row_var"], squares.mean(dim=-1, keepdim=True), share)
    columns = _mix(state["col_var"], squares.mean(dim=-2, keepdim=True), share)
    return rows * columns / rows.mean(dim=-2, keepdim=True).clamp(min=least)


def _mix(moment: Tensor, found: Tensor, share: Tensor) -> Tensor:
    return moment.mul_(1 - share).add_(found * share)


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
