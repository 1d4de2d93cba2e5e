"""An update of several passes: gradients that are summed over the dp copies of a model once, not in every pass.

The gradient of a weight is a sum over all rows, and thus over the copies; left alone XLA takes that sum in every pass.
Between `begin` and `collect` each copy therefore has weights of its own, a further dimension that is split over dp,
whose gradients need nobody else's rows: they add up over the passes where they are, and the copies' sum is taken once.

Owns: those weights, and how what is before and behind the layers of a model goes through them. Does not own: the
layers, which `scan` takes through.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_torch.parallel.rules import Spec


class CopyWeights:
    """The copies' weights in an update.

    Args:
        mesh: a `torch_xla.distributed.spmd.Mesh`.
        spec_of: how a parameter lies on it.
    """

    def __init__(self, mesh: Any, spec_of: Callable[[Tensor], Spec]) -> None:
        self._mesh = mesh
        self._spec_of = spec_of
        self._apart = False
        self._weights: dict[tuple[int, ...], tuple[list[nn.Parameter], Tensor]] = {}

    def begin(self, passes: int) -> None:
        """An update of so many passes begins; what an unfinished one left is dropped."""
        self._apart = passes > 1 and self.copies > 1
        self._weights = {}

    @property
    def copies(self) -> int:
        """How many there are."""
        copies: int = self._mesh.shape()["dp"]
        return copies

    @property
    def apart(self) -> bool:
        """Whether what is computed now is for gradients of an update of several passes."""
        return self._apart and torch.is_grad_enabled()

    @property
    def gradients(self) -> list[Tensor]:
        """Those that wait for `collect`."""
        return [weights.grad for _, weights in self._weights.values() if weights.grad is not None]

    def of(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """[parameters, dp, ...], the same tensor in all passes of an update; the parameters have one shape."""
        from torch_xla.distributed import spmd

        spec = (None, "dp", *self._spec_of(parameters[0]))
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._weights:
            stacked = torch.stack([parameter.detach() for parameter in parameters])
            # Or XLA may split them over devices as the optimizer's stacks are, and gather them here.
            spmd.mark_sharding(stacked, self._mesh, (None, *self._spec_of(parameters[0])))
            weights = stacked.unsqueeze(1).expand(-1, self.copies, *stacked.shape[1:]).clone()
            spmd.mark_sharding(weights, self._mesh, spec)
            self._weights[key] = (list(parameters), weights.requires_grad_(parameters[0].requires_grad))
        marked: Tensor = spmd.mark_sharding_with_gradients(self._weights[key][1], self._mesh, spec)
        return marked

    def parted(self, rows: Tensor) -> Tensor:
        """[B, ...] to [dp, B / dp, ...]."""
        return rows.unflatten(0, (self.copies, -1))

    def collect(self) -> None:
        """The passes are over: give parameters their gradients, summed over the copies."""
        from torch_xla.distributed import spmd

        for parameters, weights in self._weights.values():
            if weights.grad is not None:
                total = weights.grad.sum(dim=1)
                spmd.mark_sharding(total, self._mesh, (None, *self._spec_of(parameters[0])))
                for parameter, gradient in zip(parameters, total, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._apart = False
        self._weights = {}


def part_ends(model: nn.Module, copies: CopyWeights) -> None:
    """Have embeddings, norms outside of layers and `lm_head` of a DalleBart go through weights of copies."""
    stacks: list[Any] = [model.encoder, model.decoder]
    for stack in stacks:
        stack.embed_tokens.forward = _Lookup(stack.embed_tokens, copies)
        if stack.dropout.p == 0:
            stack.at_position = _OnEachCopy(stack, "at_position", ("embed_positions", "layernorm_embedding"), copies)
        if stack.final_norm is not None:
            stack.final_norm.forward = _OnEachCopy(stack.final_norm, "forward", (), copies)
    head: Any = model.lm_head
    head.forward = _OnEachCopy(head, "forward", (), copies)


class _OnEachCopy:
    """A method of a module, called with each copy's rows and weights.

    Args:
        module, method: its first argument is states [B, ...], its others are what has no rows.
        parts: names of the module's own modules that it goes through; none: all.
    """

    def __init__(self, module: nn.Module, method: str, parts: Sequence[str], copies: CopyWeights) -> None:
        self._copies = copies
        self._call = _Call(module, getattr(module, method))
        used = tuple(f"module.{part}." for part in parts or [""])
        self._names = [name for name, _ in self._call.named_parameters() if not parts or name.startswith(used)]

    def __call__(self, states: Tensor, *others: Any) -> Tensor:
        if not self._copies.apart:
            return self._call(states, *others)
        named = dict(self._call.named_parameters())
        weights = {name: self._copies.of([named[name]])[0] for name in self._names}

        def one(weights: dict[str, Tensor], states: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(self._call, weights, (states, *others))
            return result

        found: Tensor = torch.func.vmap(one)(weights, self._copies.parted(states))
        return found.flatten(0, 1)


class _Call(nn.Module):
    """A bound method as the `forward` of a module that has the parameters."""

    def __init__(self, module: nn.Module, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self._method = method

    def forward(self, *arguments: Any) -> Tensor:
        return self._method(*arguments)


class _Lookup:
    """`nn.Embedding.forward`, whose gradient adds up for each copy."""

    def __init__(self, embedding: nn.Embedding, copies: CopyWeights) -> None:
        self._embedding = embedding
        self._copies = copies

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self._embedding.weight
        if not self._copies.apart or not weight.requires_grad:
            return F.embedding(ids, weight)
        result: Tensor = _Rows.apply(ids, weight.detach(), self._copies.of([weight])[0])
        return result


class _Rows(torch.autograd.Function):
    """Rows `ids` [B, S] of `weight` [V, D]: [B, S, D]; the gradient is for the copies' weights [dp, V, D].

    It is a product with rows that are one at a token: XLA scatters into a table that is split over dp and mp only by
    sending all rows everywhere. As the gradients of products it is taken in the dtype of autocast.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, each_copy_s: Tensor) -> Tensor:
        device = weight.device.type
        ctx.save_for_backward(ids)
        ctx.table = each_copy_s.shape
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        copies, vocabulary, width = ctx.table
        tokens = torch.arange(vocabulary, device=ids.device)
        at_token = (ids.reshape(copies, 1, -1) == tokens.view(1, -1, 1)).to(ctx.dtype)
        of_rows = gradient.reshape(copies, -1, width).to(ctx.dtype)
        return None, None, torch.bmm(at_token, of_rows).to(gradient.dtype)
