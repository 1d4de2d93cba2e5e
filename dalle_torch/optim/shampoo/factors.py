"""The numbers of an update that may be others in the next one: learning rate, weight decay, averages' weights.

Owns: whether they are numbers or scalars on the device, operations with either. Does not own: their bounds (`options`),
what they are for (`update`).
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.options import ShampooOptions

Factor: TypeAlias = float | Tensor
"""A number, or a float32 tensor []."""


@dataclass(frozen=True)
class Factors:
    """The factors of an update.

    Attributes:
        decays: whether parameters have to be read for weight decay.
        lr, weight_decay, beta1, beta2: as in the options.
        weight1: of what enters the momentum.
        weight2: of what enters the second moments.
    """

    decays: bool
    lr: Factor
    weight_decay: Factor
    beta1: Factor
    weight1: Factor
    beta2: Factor
    weight2: Factor


def factors(options: ShampooOptions, device: torch.device, compile: bool = False) -> Factors:
    """What `options` come to on `device`; nothing waits for it.

    Args:
        compile: the update is compiled by torch.

    Numbers would become constants of compiled code, and each new one other code: there they are tensors, and on
    torch_xla a weight decay of zero takes the same operations as any other.
    """
    weight1 = 1 - options.beta1 if options.moving_average_for_momentum else 1.0
    weight2 = 1 - options.beta2 if options.beta2 != 1 else 1.0
    lr: Factor = options.lr.detach().reshape(()).float() if isinstance(options.lr, Tensor) else float(options.lr)
    if isinstance(lr, Tensor) and "cpu" in (lr.device.type, device.type):
        # To read it on a CPU waits for nothing, and a rate is the same number in either form.
        lr = float(lr)
    numbers: list[Factor] = [options.weight_decay, options.beta1, weight1, options.beta2, weight2]
    if compile or device.type == "xla":
        # One transfer for all, which the host need not wait for.
        known = 0.0 if isinstance(lr, Tensor) else lr
        values = torch.tensor([known, *map(float, numbers)], dtype=torch.float32)
        first, *numbers = values.to(device, non_blocking=True).unbind()
        lr = lr.to(device) if isinstance(lr, Tensor) else first
    return Factors(bool(options.weight_decay) or device.type == "xla", lr, *numbers)


def average_(target: Tensor, value: Tensor, old: Factor, new: Factor) -> Tensor:
    """target = target * old + value * new."""
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return target.mul_(old).add_(value * new)
    return target.mul_(old).add_(value, alpha=new)


def plus_scaled(base: Tensor, value: Tensor, factor: Factor) -> Tensor:
    """base + value * factor, a new tensor."""
    return base + value * factor if isinstance(factor, Tensor) else torch.add(base, value, alpha=factor)


def add_square_(target: Tensor, value: Tensor, factor: Factor) -> Tensor:
    """target += value^2 * factor."""
    if isinstance(factor, Tensor):
        return target.addcmul_(value, value * factor)
    return target.addcmul_(value, value, value=factor)


def average_product_(target: Tensor, unfolded: Tensor, old: Factor, new: Factor) -> Tensor:
    """target = target * old + U U^T * new, for batches of U [N, d, e]; target is [N, d, d]."""
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return target.mul_(old).add_(torch.bmm(unfolded, unfolded.mT) * new)
    return target.baddbmm_(unfolded, unfolded.mT, beta=old, alpha=new)
