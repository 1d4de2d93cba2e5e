"""The update that Shampoo takes its size from, of a diagonal method that runs beside it.

Shapes: L parameters of one shape are handled together, [L, *shape]; norms are those of each of the L.
Owns: grafting updates and their diagonal statistics. Does not own: momentum, learning rate.
Source: Anil et al., "Scalable Second Order Optimization for Deep Learning", arXiv 2002.09018, section 4.
"""

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.factors import Factors, add_square_
from dalle_torch.optim.shampoo.options import GraftType, ShampooOptions

TINY = 1e-16
"""Keeps norms that are divided by off zero."""


def keeps_diagonal(graft: GraftType) -> bool:
    """Whether a graft type has statistics of the gradient's squares."""
    return graft not in ("sgd", "sqrt_n")


def norms(stack: Tensor) -> Tensor:
    """Euclidean norm of each of the L tensors, float32 [L]."""
    if stack.shape[0] == 1:
        return torch.linalg.vector_norm(stack).view(1)
    return torch.linalg.vector_norm(stack.flatten(1), dim=1)


def over(values: Tensor, stack: Tensor) -> Tensor:
    """[L] shaped to be broadcast over [L, *shape]."""
    return values.view(-1, *([1] * (stack.ndim - 1)))


def grafting_update(
    options: ShampooOptions, factors: Factors, gradient: Tensor, norm: Tensor, diagonal: Tensor | None
) -> Tensor:
    """The diagonal method's update, before the learning rate.

    Args:
        gradient: float32 [L, *shape], or a part of each of the L.
        norm: of each whole gradient, [L].
        diagonal: statistics of `gradient`'s shape, updated in place; None where the graft type has none.

    Returns:
        A tensor of `gradient`'s shape; `gradient` itself is not written to.
    """
    graft = options.graft_type
    if graft == "sgd":
        return gradient
    if graft == "sqrt_n":
        return gradient.sign()
    assert diagonal is not None
    normalized = graft.endswith("_normalized")
    if normalized:
        gradient = gradient * over((norm + TINY).reciprocal(), gradient)
    if graft.startswith("adagrad"):
        diagonal.addcmul_(gradient, gradient)
    else:
        add_square_(diagonal.mul_(factors.beta2), gradient, factors.weight2)
    divisor = _root(diagonal).add_(options.diagonal_epsilon)
    return gradient.div_(divisor) if normalized else gradient / divisor


def _root(values: Tensor) -> Tensor:
    """Square roots, in a new tensor."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch's own on a CPU takes five times as long for zeros, which the moments of unused embeddings are.
        return values.rsqrt().reciprocal_()
    return values.sqrt()


def clipped(options: ShampooOptions, update: Tensor) -> Tensor:
    """The update with its root mean square limited by `clip_by_scaled_gradient_norm`, where that applies."""
    limit = options.clip_by_scaled_gradient_norm
    if limit is None or not options.graft_type.startswith("rmsprop"):
        return update
    size = update[0].numel()
    return update / over((norms(update) / (size**0.5 * limit)).clamp_min(1.0), update)
