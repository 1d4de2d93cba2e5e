"""The layers of a stack as a loop that XLA compiles once, instead of one after the other.

Owns: which layers can be one loop, torch_xla's `scan` and what it needs around it. Does not own: the layers, whose
parameters stay one set each: they are stacked inside the step.

`scan` traces one layer ahead of time, forward and backward, into two bodies of loops. What the loop carries from layer
to layer are the states and what every layer is given beside them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dalle_torch.parallel.copies import CopyWeights
from dalle_torch.parallel.rules import Spec

Structure = tuple[Any, ...]


class LayerScan:
    """Runs layers in the place of calls of one after the other; layers of a kind that are neighbours are a loop.

    Args:
        mesh: a `torch_xla.distributed.spmd.Mesh`.
        spec_of: how a parameter lies on it.
        copies: the weights in an update of several passes.
        recompute: gradient checkpointing: of each layer the loop keeps its inputs alone.
    """

    def __init__(self, mesh: Any, spec_of: Callable[[Tensor], Spec], copies: CopyWeights, recompute: bool) -> None:
        self._mesh = mesh
        self._spec_of = spec_of
        self._copies = copies
        self._recompute = recompute
        # torch_xla keeps what it traced for as long as it is given the very same function.
        self._bodies: dict[Any, Callable[..., Any]] = {}

    def __call__(self, layers: Sequence[nn.Module], x: Tensor, *context: Tensor | None) -> Tensor:
        """The last layer's states [B, S, d_model]; `context` is what each layer takes beside the last one's."""
        for run in runs(layers):
            x = run[0](x, *context) if len(run) == 1 else self._loop(run, x, context)
        return x

    def _loop(self, layers: Sequence[nn.Module], x: Tensor, context: Sequence[Tensor | None]) -> Tensor:
        apart = self._copies.apart
        x = narrowed(x)
        body = self._body(layers[0], context, apart)
        given = [value for value in context if value is not None]
        # The loop's variables have gradients, which truth values have not.
        carried = [self._by_rows(value.to(x.dtype) if value.dtype == torch.bool else value) for value in given]
        weights = self._each_copy_s if apart else self._stacked
        parameters = {name: weights(layers, name) for name, _ in layers[0].named_parameters()}
        partition = {"partition_fn": recompute_everything} if self._recompute else {}
        # The body enters it by itself, so that what was traced is not converted a second time.
        with torch.autocast("xla", enabled=False):
            (x, *_), _ = _scan()(body, (self._by_rows(x), *carried), parameters, is_fn_pure=True, **partition)
        return x

    def _stacked(self, layers: Sequence[nn.Module], name: str) -> Tensor:
        from torch_xla.distributed import spmd

        each = [layer.get_parameter(name) for layer in layers]
        spec = (None, *self._spec_of(each[0]))
        return spmd.mark_sharding_with_gradients(torch.stack(each), self._mesh, spec)

    def _each_copy_s(self, layers: Sequence[nn.Module], name: str) -> Tensor:
        return self._copies.of([layer.get_parameter(name) for layer in layers])

    def _by_rows(self, value: Tensor) -> Tensor:
        from torch_xla.distributed import spmd

        return spmd.mark_sharding_with_gradients(value, self._mesh, ("dp", *(None,) * (value.ndim - 1)))

    def _body(self, layer: nn.Module, context: Sequence[Tensor | None], apart: bool) -> Callable[..., Any]:
        """One turn of the loop: (states, context), parameters -> the same with new states, nothing to collect."""
        kinds = tuple(value if value is None else value.dtype for value in context)
        precision = torch.get_autocast_dtype("xla") if torch.is_autocast_enabled("xla") else None
        key = (id(layer), kinds, precision, layer.training, apart)
        call = self._on_each_copy if apart else torch.func.functional_call
        if key not in self._bodies:

            def body(carried: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], None]:
                x, *given = carried
                rest = iter(given)
                arguments = [
                    None if kind is None else next(rest) > 0.5 if kind == torch.bool else next(rest) for kind in kinds
                ]
                with torch.autocast("xla", precision, enabled=precision is not None, cache_enabled=False):
                    states = call(layer, parameters, (x, *arguments))
                states = self._by_rows(states.to(x.dtype))
                return (states, *(value.clone() for value in given)), None

            self._bodies[key] = body
        return self._bodies[key]

    def _on_each_copy(
        self, layer: nn.Module, parameters: dict[str, Tensor], arguments: tuple[Tensor | None, ...]
    ) -> Tensor:
        """`functional_call` with parameters [dp, ...]: each copy's rows of the arguments go through its own."""
        given = {index: value for index, value in enumerate(arguments) if value is not None}

        def one(parameters: dict[str, Tensor], given: dict[int, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, parameters, tuple(given.get(i) for i in range(len(arguments))))

        parted = {index: self._copies.parted(value) for index, value in given.items()}
        states: Tensor = torch.func.vmap(one)(parameters, parted)
        return states.flatten(0, 1)


def scan_layers(
    stacks: Sequence[nn.Module],
    mesh: Any,
    spec_of: Callable[[Tensor], Spec],
    copies: CopyWeights,
    recompute: bool = False,
) -> None:
    """Have every stack run its layers as loops.

    Args:
        stacks: each has `layers` and the hook `run_layers`, as DalleBart's encoder and decoder.

    Raises:
        ValueError: the layers drop out, which would be the same entries in the loop as traced once.
    """
    dropping = [name for stack in stacks for name in _dropouts(stack)]
    if dropping:
        raise ValueError(
            f"training.use_scan=true is not for models with dropout, and this one has it in {dropping[0]} and "
            f"{len(dropping) - 1} other places: set the model's dropout, attention_dropout and activation_dropout to "
            f"0, or training.use_scan to false"
        )
    for stack in stacks:
        stack.run_layers = LayerScan(mesh, spec_of, copies, recompute)
        for run in runs(stack.layers):
            if len(run) > 1:
                for layer in run:
                    layer.gradient_checkpointing = False


def narrow_states(stacks: Sequence[nn.Module]) -> None:
    """Have the states between layers be of the dtype of autocast where that is on, as the original's are.

    They are what gradient checkpointing keeps; sums and norms inside of a layer stay in float32.
    """
    for stack in stacks:
        for layer in stack.layers:
            layer.register_forward_hook(lambda _module, _inputs, states: narrowed(states))


def narrowed(states: Tensor) -> Tensor:
    """`states` in the dtype of autocast, if that is on for their device."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def runs(layers: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbours that compute the same but for the values of their parameters, in order."""
    for _, alike in groupby(layers, key=structure):
        yield list(alike)


def structure(layer: nn.Module) -> Structure:
    """Everything that decides what `layer` computes, save for the values of its parameters."""
    plain = (bool, int, float, str, type(None))
    modules = [
        (name, type(module), sorted((key, value) for key, value in vars(module).items() if isinstance(value, plain)))
        for name, module in layer.named_modules()
    ]
    parameters = [
        (name, parameter.shape, parameter.dtype, parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    ]
    return (modules, parameters)


def recompute_everything(joint: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """Part forward from backward so that the backward pass computes all it needs from the layer's inputs."""
    from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
    from torch.utils.checkpoint import CheckpointPolicy

    for node in joint.graph.nodes:
        if node.op == "call_function":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, inputs, **options)


def _dropouts(stack: nn.Module) -> list[str]:
    rates = [
        (name, module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", None))
        for name, module in stack.layers.named_modules()
    ]
    return [name for name, rate in rates if isinstance(rate, float) and rate > 0]


def _scan() -> Callable[..., Any]:
    """torch_xla's, without its call of JAX: marks on parameters and states say how their gradients lie."""
    from torch_xla.experimental.scan import scan

    module: Any = sys.modules["torch_xla.experimental.scan"]
    module.shard_as = lambda *trees: trees
    return scan
