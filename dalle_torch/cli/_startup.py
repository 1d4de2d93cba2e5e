"""Keeps out of a command's start what drawing does not use.

Owns: the order in which heavy packages come in, for commands that draw and leave. Does not own: what the library does
when it is imported by a program; nothing here is imported from outside `cli`.

transformers' `modeling_utils` imports `torch._dynamo` (with sympy and much of Inductor, a third of its whole time) for
two decorators, torchvision for an enum, and scipy, where there is one, for the losses of detection models. Here the
decorators are applied without it, and those losses are left without; whoever needs the rest of `torch._dynamo` gets it
at the first touch.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"


def import_models(*, image_processors: bool = False) -> None:
    """Import transformers' model base class as lightly as it goes.

    Args:
        image_processors: transformers' image processors will be used, so torchvision may come in too.
    """
    import torch

    if not image_processors and "torchvision" not in sys.modules:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    with _deferred_dynamo(torch), _unseen_scipy():
        importlib.import_module("transformers.modeling_utils")
    if sys.modules.get("torchvision", ...) is None:
        del sys.modules["torchvision"]


@contextmanager
def _unseen_scipy() -> Iterator[None]:
    utils = importlib.import_module("transformers.utils")
    real = utils.is_scipy_available
    vars(utils)["is_scipy_available"] = lambda: False
    try:
        yield
    finally:
        vars(utils)["is_scipy_available"] = real


@contextmanager
def _deferred_dynamo(torch: ModuleType) -> Iterator[None]:
    """While it lasts, `torch._dynamo` is a stand-in that knows the decorators and turns into the real one otherwise."""
    if _DYNAMO in sys.modules:
        yield
        return
    real_disable = torch.compiler.disable
    stand_in = _Dynamo(_DYNAMO)
    sys.modules[_DYNAMO] = stand_in
    vars(torch)["_dynamo"] = stand_in
    torch.compiler.disable = functools.partial(_disable_later, real_disable)
    try:
        yield
    finally:
        torch.compiler.disable = real_disable
        if sys.modules.get(_DYNAMO) is stand_in:
            stand_in.leave()


class _Dynamo(ModuleType):
    """Stands where `torch._dynamo` will be."""

    @staticmethod
    def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
        # All that the real one does.
        function._dynamo_marked_constant = True  # type: ignore[attr-defined]
        return function

    @staticmethod
    def allow_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        # Would note the function for the compiler; only transformers' FP8 kernels ask for it, which are not ours.
        return function

    def leave(self) -> None:
        """Make way for the real module, which the next import loads."""
        import torch

        sys.modules.pop(_DYNAMO, None)
        torch.__dict__.pop("_dynamo", None)

    def __getattr__(self, name: str) -> Any:
        if name in ("__spec__", "__file__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_DYNAMO), name)


def _disable_later(
    disable: Callable[..., Any], function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any
) -> Callable[..., Any]:
    """`torch.compiler.disable`, applied when the function is first called."""
    if function is None:
        return functools.partial(_disable_later, disable, recursive=recursive, **options)

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return disable(function, recursive, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs)

    return call
