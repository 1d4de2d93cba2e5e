"""Parameters of one shape that started together, and their state.

Shapes: L parameters, stacked [L, *shape]; K blocks of each in a region.
Owns: which tensors the state is made of, who takes part in an update. Does not own: the update (`update`), blocks
(`preconditioner`).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.blocking import merged_shape, regions
from dalle_torch.optim.shampoo.factors import Factors
from dalle_torch.optim.shampoo.grafting import keeps_diagonal, norms
from dalle_torch.optim.shampoo.options import STRUCTURAL, ShampooOptions
from dalle_torch.optim.shampoo.preconditioner import RegionMatrices
from dalle_torch.optim.shampoo.sharding import Sharding
from dalle_torch.optim.shampoo.update import Now, Run, step, step_in_one_pass, without_nonfinite

_RUN_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Elements that are taken through all operations in one go: on a CPU they stay in cache, on a GPU in its memory."""


def preconditioned_shape(shape: Sequence[int], options: ShampooOptions) -> tuple[int, ...] | None:
    """The shape that is cut into blocks, or None for a parameter that is not preconditioned."""
    if not shape or 0 in shape or max(shape) > options.skip_preconditioning_dim_size_gt:
        return None
    if not options.best_effort_shape_interpretation:
        return tuple(shape)
    return merged_shape(shape, options.merge_small_dims_block_size)


def late_start(updates: int, options: ShampooOptions) -> str | None:
    """What is wrong, if anything, with the start of preconditioning where that started within `updates`.

    The diagonal method's momentum is not kept up behind the start, so there is no way back.
    """
    if options.start_preconditioning_step <= updates:
        return None
    return (
        f"start_preconditioning_step={options.start_preconditioning_step}, and after {updates} updates they are "
        f"preconditioned already, so that it can be {updates} at most"
    )


class Bucket:
    """L parameters of one shape, dtype and device, with their state.

    Args:
        compile: the update of parameters without preconditioner goes through `torch.compile`.

    Attributes:
        parameters: the L.
        updates: how many updates were made.
        started: whether one of them was preconditioned.
        stacks: state by name, the parameters along dimension 0.
        matrices: one for each region of the blocks; empty if the parameters are not preconditioned.
    """

    def __init__(
        self, parameters: list[Tensor], options: ShampooOptions, sharding: Sharding, compile: bool = False
    ) -> None:
        first = parameters[0]
        self.parameters = parameters
        self.options = options
        self.compile = compile
        self.sharding = sharding
        self.updates = 0
        self.started = False
        self.merged = preconditioned_shape(first.shape, options)
        self.in_one_pass = compile and self.merged is None
        quantized = options.best_effort_memory_usage_reduction and first.ndim > 1
        self.stacks: dict[str, Tensor] = {}
        # Without preconditioner both updates are the same, and so are their momenta.
        for name in ("momentum", "diagonal_momentum")[: 1 if self.merged is None else 2]:
            self.stacks[name] = self._zeros(first.shape, torch.int8 if quantized else torch.float32)
            if quantized:
                self.stacks[f"{name}_scale"] = self._zeros((1, *first.shape[1:]), torch.float32)
        if keeps_diagonal(options.graft_type):
            self.stacks["diagonal_statistics"] = self._zeros(first.shape, torch.float32)
        for name in ("root_failures", "nonfinite_gradients"):
            self.stacks[name] = self._zeros((), torch.int32)
        # For whoever reads the state; what counts is `updates`, which costs no look at a tensor.
        self.clock = torch.zeros(len(parameters), dtype=torch.int64)
        self.matrices = [
            RegionMatrices(region, self.stacks["root_failures"], options, sharding, first)
            for region in (regions(self.merged, options.block_size) if self.merged else ())
        ]

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        first = self.parameters[0]
        return self._constrain(torch.zeros((len(self.parameters), *shape), dtype=dtype, device=first.device))

    def _constrain(self, stack: Tensor) -> Tensor:
        first = self.parameters[0]
        return self.sharding.constrain(stack, first if stack.shape[1:] == first.shape else "whole")

    @property
    def block_sizes(self) -> set[int]:
        """Sides of the matrices."""
        return {size for matrices in self.matrices for size in matrices.region.sizes}

    def tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """All state: its name, its tensor, and how many entries along dimension 0 a parameter has (0: one, bare)."""
        for name, stack in {"step": self.clock, **self.stacks}.items():
            yield name, stack, 0
        for r, matrices in enumerate(self.matrices):
            for kind in ("statistics", "preconditioners"):
                for d, stack in enumerate(getattr(matrices, kind)):
                    yield f"{kind}.{r}.{d}", stack, matrices.region.blocks

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter: views."""
        return {
            name: stack[index * blocks : (index + 1) * blocks] if blocks else stack[index]
            for name, stack, blocks in self.tensors()
        }

    def changed(self, options: ShampooOptions) -> list[str]:
        """What the state was made with and `options` no longer say, each with both values."""
        problems = [
            f"{name}={getattr(options, name)!r}, and its state was made with {getattr(self.options, name)!r}"
            for name in STRUCTURAL
            if getattr(options, name) != getattr(self.options, name)
        ]
        if self.matrices and self.started and (problem := late_start(self.updates, options)):
            problems.append(problem)
        return problems

    def parted(self) -> list["Bucket"]:
        """Itself, or two where some parameters have a gradient and some have none: from here on their clocks differ."""
        sides: tuple[list[int], list[int]] = ([], [])
        for index, parameter in enumerate(self.parameters):
            sides[parameter.grad is None].append(index)
        if not all(sides):
            return [self]
        parts = []
        for side in sides:
            part = Bucket([self.parameters[index] for index in side], self.options, self.sharding, self.compile)
            part.load([self.state_of(index) for index in side], self.started)
            parts.append(part)
        return parts

    def load(self, states: Sequence[Mapping[str, Tensor]], started: bool) -> None:
        """Take over the state of the L parameters, each as `state_of` names it, and whether preconditioning started."""
        for name, stack, blocks in self.tensors():
            values = [state[name] for state in states]
            joined = torch.cat(values) if blocks else torch.stack(values)
            stack[: len(joined)].copy_(joined)
            if blocks:
                self.sharding.constrain(stack, "blocks")
        self._keep_layout()
        self.set_clock(int(states[0]["step"]), started)

    def set_clock(self, updates: int, started: bool) -> None:
        """So many updates were made, and preconditioning has `started` or not."""
        self.updates, self.started = updates, started
        self.clock.fill_(updates)

    def update(self, options: ShampooOptions, now: Now) -> None:
        """One update of every parameter that has a gradient."""
        for start, stop in self._runs():
            run = self._run(start, stop)
            if options.skip_nonfinite_gradients:
                self.stacks["nonfinite_gradients"][start:stop].add_(~run.norm.isfinite())
            taking = now.factors if now.statistics_due else None
            of_run = partial(self._precondition, start=start, stop=stop, factors=taking)
            precondition = of_run if self.matrices else None
            for part in self._parts(run, options):
                part = without_nonfinite(part, run.norm) if options.skip_nonfinite_gradients else part
                if self.in_one_pass:
                    step_in_one_pass(part, options, now)
                else:
                    step(part, options, now, precondition)
        self.started |= self.updates >= options.start_preconditioning_step
        self.updates += 1
        self.clock.fill_(self.updates)
        self._keep_layout()

    def _keep_layout(self) -> None:
        # What is not marked lies as the compiler likes after a step, and another layout is another graph.
        for stack in self.stacks.values():
            self._constrain(stack)

    def _precondition(self, gradient: Tensor, *, start: int, stop: int, factors: Factors | None) -> Tensor:
        """The preconditioned gradients, float32 [stop - start, *shape], of the parameters from `start` to `stop`."""
        assert self.merged is not None
        stack = gradient.reshape(stop - start, *self.merged)
        result = torch.empty(stack.shape, device=stack.device)
        for matrices in self.matrices:
            matrices.precondition(stack, result, start, stop, factors)
        return self._constrain(result.view(gradient.shape))

    @property
    def has_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Neighbours that have gradients, a bounded number at a time."""
        limit = _RUN_ELEMENTS.get(self.parameters[0].device.type)
        longest = len(self.parameters) if limit is None else max(1, limit // max(1, self.parameters[0].numel()))
        start: int | None = None
        for index in range(len(self.parameters) + 1):
            there = index < len(self.parameters) and self.parameters[index].grad is not None
            if start is not None and (not there or index - start == longest):
                yield start, index
                start = None
            if there and start is None:
                start = index

    def _run(self, start: int, stop: int) -> Run:
        parameters = self.parameters[start:stop]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradient = self._constrain(
            (gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)).float()
        )
        whole = len(parameters) == len(self.parameters)
        state = {name: stack if whole else stack[start:stop] for name, stack in self.stacks.items()}
        return Run(parameters, gradient, norms(gradient), state)

    def _parts(self, run: Run, options: ShampooOptions) -> Iterator[Run]:
        """The run itself, or, where it is one large tensor that nothing looks at as a whole, pieces of that."""
        limit = _RUN_ELEMENTS.get(run.gradient.device.type)
        names = [name for name in ("momentum", "diagonal_statistics") if name in run.state]
        tensors = [run.parameters[0].unsqueeze(0), run.gradient, *(run.state[name] for name in names)]
        whole = self.matrices or "momentum_scale" in run.state or options.clip_by_scaled_gradient_norm is not None
        large = limit is not None and run.gradient.shape[0] == 1 and run.gradient.numel() > limit
        if whole or not large or self.in_one_pass or not all(tensor.is_contiguous() for tensor in tensors):
            yield run
            return
        pieces = (tensor.view(1, -1).split(limit, dim=1) for tensor in tensors)
        for parameter, gradient, *state in zip(*pieces, strict=True):
            yield Run([parameter[0]], gradient, run.norm, dict(zip(names, state, strict=True)))
