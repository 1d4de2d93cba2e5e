"""Gradient checkpointing of layers: of each its inputs are kept, and the rest is computed again in the backward pass.

Owns: which function does it on which device, switching it on. Does not own: what a layer is: one is told by its
attribute `gradient_checkpointing`, as transformers does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(model: nn.Module, on: bool, device_type: str) -> None:
    """Switch it on or off for all layers of `model`, which are on a device of that type.

    Raises:
        ValueError: nothing in the model can be checkpointed.
    """
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if on and not layers:
        raise ValueError(
            f"training.gradient_checkpointing=true, but {type(model).__name__} has no layers that can do it: leave it "
            f"out"
        )
    function: Any = _on_xla if device_type == "xla" else partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = function


def _on_xla(call: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """By torch_xla's function, the only one that its devices have.

    Given a method it puts a barrier between the weights of the method's module and what is computed again, without
    which XLA would find both to be the same and keep all of it. It is reentrant: where no input wants a gradient, as
    after frozen embeddings, parameters would get none either.
    """
    from torch_xla.utils.checkpoint import checkpoint as checkpoint_on_xla

    if not any(value is not None and value.requires_grad for value in inputs):
        if not any(parameter.requires_grad for parameter in _module_of(call).parameters()):
            return call(*inputs)
        states, *context = inputs
        assert states is not None
        inputs = (states.detach().requires_grad_(), *context)
    return checkpoint_on_xla(call, *inputs)


def _module_of(call: Callable[..., Any]) -> nn.Module:
    module = getattr(getattr(call, "func", call), "__self__", None)
    assert isinstance(module, nn.Module)
    return module
