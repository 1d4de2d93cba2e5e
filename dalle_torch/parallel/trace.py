"""The step of a mesh that is not there, as the program that torch_xla would compile for it.

Owns: stand-ins for what a step reads from devices (weights, optimizer state, batches), which have a shape, a dtype and
a layout but no values; the program of a step, what goes into it, and what of that it overwrites. Does not own: the
step, compiling the program.

The engine is `SpmdEngine` but for the places where that one asks a runtime for devices or sends tensors to them. No
tensor is allocated, so that a step of billions of parameters is traced in the memory of its program.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle_torch.config import MeshConfig
from dalle_torch.parallel import spmd
from dalle_torch.parallel.mesh import AXES, plan_mesh
from dalle_torch.parallel.rules import Rule, lay_out
from dalle_torch.parallel.spmd_engine import SpmdEngine, groups_of_devices, use_full_precision

REPLICATED = "{replicated}"
"""XLA's word for a tensor that every device has all of."""

ENVIRONMENT = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "XLA_HLO_DEBUG": "1", "XLA_IR_DEBUG": "1"}
"""What has to be set before torch_xla is imported: one device that nothing is computed on, and a program that says of
each operation where it comes from."""


@dataclass(frozen=True)
class TracedInput:
    """One parameter of a program.

    Attributes:
        name: of the tensor; "scalar 3" for the numbers that a step sends along.
        shape, dtype: of the whole tensor.
        sharding: how it lies on the devices, in XLA's words.
        output: number of the result that takes its place in memory; None: it is read alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    output: int | None


@dataclass(frozen=True)
class TracedStep:
    """A program before it is split over devices.

    Attributes:
        program: XLA's `HloModuleProto`, serialized.
        inputs: its parameters, in order.
        outputs: names of its results, in order: what the step returns, and every tensor that it changes.
        devices: how many there are.
    """

    program: bytes
    inputs: tuple[TracedInput, ...]
    outputs: tuple[str, ...]
    devices: int


@dataclass
class _StandIn:
    """A tensor that the devices hold when a step begins; `number` is torch_xla's of what is read there."""

    tensor: Tensor
    sharding: str
    number: int

    @torch.no_grad()
    def renew(self) -> None:
        """Forget how the tensor is computed, and its views with it."""
        import torch_xla

        placeholder = _placeholder(self.tensor.shape, self.tensor.dtype)
        self.number = _number(placeholder)
        # Or the copy would be an operation that lays it out.
        torch_xla._XLAC._xla_clear_sharding(self.tensor)
        self.tensor.copy_(placeholder)


class TracingEngine(SpmdEngine):
    """`SpmdEngine` on devices that are described. Set `ENVIRONMENT` before anything imports torch_xla.

    Args:
        mesh: as the run has it.
        of_hosts: for each host the numbers of its devices among all.

    Raises:
        ValueError: torch_xla is not installed, or the mesh does not fit the devices.
        RuntimeError: torch_xla was imported without `ENVIRONMENT`.
    """

    def __init__(self, mesh: MeshConfig, of_hosts: Sequence[Sequence[int]]) -> None:
        devices = sum(map(len, of_hosts))
        self.mesh = plan_mesh(mesh, devices, len(of_hosts), len(of_hosts[0]))
        self.device: torch.device = _start()
        self.host_index, self.host_count = 0, len(of_hosts)
        with _counted_devices(devices):
            self.xla_mesh = spmd.make_mesh(self.mesh, self.mesh.device_order(of_hosts))
        self.specs = {}
        self._uneven = mesh.uneven
        self._groups = groups_of_devices(of_hosts[0], self.mesh.mp)
        self._held: dict[str, _StandIn] = {}
        self._sent: list[_StandIn] = []
        self._copies = None
        self._scopes = _Scopes()

    def place(self, model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
        """`model`, which is on the meta device, with stand-ins for parameters."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.specs = lay_out(shapes, rules, self.mesh.sizes, self._uneven)
        assert not list(model.buffers()), "a buffer has values, and here there are none"
        for name, parameter in list(model.named_parameters()):
            owner, _, last = name.rpartition(".")
            tensor = nn.Parameter(_placeholder(parameter.shape, parameter.dtype), parameter.requires_grad)
            setattr(model.get_submodule(owner), last, tensor)
            self._held[name] = _StandIn(tensor, self._words(self.specs[name]), _number(tensor))
        self._spec_of = spmd.spec_lookup(model, self.specs)
        return model

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """From here on `tensors`, laid out as they are marked, are what the devices hold when a step begins."""
        for name, tensor in tensors.items():
            self._held[name] = _StandIn(tensor, spmd.layout_of(tensor) or REPLICATED, _number(tensor))
            self._held[name].renew()

    def name_parts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Have operations carry the names of the modules that they are of, or of the optimizer."""
        for name, module in model.named_modules():
            # A name's dots would be taken for torch_xla's own counting.
            last = name.rpartition(".")[2]
            last = f"layer{last}" if last.isdecimal() else last
            if name and not isinstance(module, nn.ModuleList):
                module.register_forward_pre_hook(lambda *_, part=last: self._scopes.enter(part))
                module.register_forward_hook(lambda *_: self._scopes.leave(), always_call=True)
        optimizer.register_step_pre_hook(lambda *_: self._scopes.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._scopes.leave())

    def end_step(self) -> None:
        """What was recorded waits for `program`."""

    def wait(self) -> None:
        """Nothing is computed."""

    def program(self, step: Callable[[], Mapping[str, Tensor]]) -> TracedStep:
        """The program of a step that returns some tensors; what it changes are stand-ins again afterwards."""
        import torch_xla

        self._sent = []
        with _counted_devices(self.mesh.devices), self._layouts_known(), self._scopes.in_loops():
            results = dict(step())
        results |= {name: held.tensor for name, held in self._held.items() if _computed(held.tensor)}
        tensors = list(results.values())
        numbers, values = torch_xla._XLAC._get_tensors_xla_device_data_node(tensors)
        program = torch_xla._XLAC._get_xla_tensors_hlo_proto(tensors)
        inputs = self._inputs(numbers, values, list(results))
        for held in self._held.values():
            if _computed(held.tensor):
                held.renew()
        return TracedStep(program, inputs, tuple(results), self.mesh.devices)

    def _inputs(self, numbers: Sequence[int], values: Sequence[Tensor], outputs: list[str]) -> tuple[TracedInput, ...]:
        places = {name: index for index, name in enumerate(outputs)}
        known = {held.number: (name, held.sharding, places.get(name)) for name, held in self._held.items()}
        known |= {sent.number: (f"batch {index}", sent.sharding, None) for index, sent in enumerate(self._sent)}
        scalars = (f"scalar {index}" for index in range(len(numbers)))
        found = []
        for number, value in zip(numbers, values, strict=True):
            name, sharding, output = known.get(number) or (next(scalars), REPLICATED, None)
            dtype = str(value.dtype).removeprefix("torch.")
            found.append(TracedInput(name, tuple(value.shape), dtype, sharding, output))
        return tuple(found)

    def _send(self, rows: Tensor) -> Tensor:
        tensor = _placeholder((self.mesh.devices, *rows.shape[1:]), rows.dtype)
        words = self._words((AXES, *(None,) * (rows.ndim - 1)))
        self._sent.append(_StandIn(tensor, words, _number(tensor)))
        return tensor

    def _words(self, spec: Sequence[Any]) -> str:
        if not any(spec):
            return REPLICATED
        marked = torch.zeros((1,) * len(spec), device=self.device)
        return spmd.layout_of(spmd.mark(marked, self.xla_mesh, tuple(spec)))  # type: ignore[arg-type]

    @contextmanager
    def _layouts_known(self) -> Iterator[None]:
        """Marks of what a step finds on the devices are passed over: there they were made before it began."""
        from torch_xla.distributed import spmd as xla_spmd

        real = xla_spmd.mark_sharding

        def mark_sharding(tensor: Tensor, mesh: Any, spec: Any) -> Any:
            return real(tensor, mesh, spec) if _computed(tensor) else tensor

        xla_spmd.mark_sharding = mark_sharding
        try:
            yield
        finally:
            xla_spmd.mark_sharding = real


class _Scopes:
    """Names under which operations are recorded, the innermost last."""

    def __init__(self) -> None:
        self._open: list[tuple[str, Any]] = []

    def enter(self, name: str) -> None:
        from torch_xla.debug.profiler import Trace

        trace = Trace(name)
        trace.__enter__()
        self._open.append((name, trace))

    def leave(self) -> None:
        _, trace = self._open.pop()
        trace.__exit__(None, None, None)

    @contextmanager
    def in_loops(self) -> Iterator[None]:
        """The backward pass of a loop of layers goes by the names that its forward pass was in."""
        import torch_xla.experimental.scan  # noqa: F401  # the package has a function of that name

        module: Any = sys.modules["torch_xla.experimental.scan"]
        real = module.value_and_grad_partitioned

        def named(*arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
            forward, alias_input, backward = real(*arguments, **options)
            names = [name for name, _ in self._open]

            def named_backward(carry: Any, x: Any) -> Any:
                for name in names:
                    self.enter(name)
                try:
                    return backward(carry, x)
                finally:
                    for _ in names:
                        self.leave()

            return forward, alias_input, named_backward

        module.value_and_grad_partitioned = named
        try:
            yield
        finally:
            module.value_and_grad_partitioned = real


def _start() -> torch.device:
    try:
        import torch_xla
        import torch_xla.runtime as xr
    except ImportError as error:
        raise ValueError(f"a plan needs torch_xla (pip install 'dalle-torch[plan]'): {error}") from error
    if wrong := [name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value]:
        raise RuntimeError(f"{', '.join(wrong)} must be set before torch_xla is imported, as in ENVIRONMENT")
    xr.use_spmd()
    use_full_precision()
    return torch_xla.device()


def _placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    from torch_xla.core.xla_builder import create_placeholder_tensor

    return create_placeholder_tensor(tuple(shape), dtype)


def _number(tensor: Tensor) -> int:
    import torch_xla

    return torch_xla._XLAC._xla_get_tensor_id(tensor)


def _computed(tensor: Tensor) -> bool:
    """Whether `tensor` is the result of something, rather than what lies on the devices."""
    import torch_xla

    told = torch_xla._XLAC._get_xla_tensor_debug_info(tensor)
    return not any(line.startswith("IR: None") or "xla::device_data" in line for line in told.splitlines())


@contextmanager
def _counted_devices(count: int) -> Iterator[None]:
    """A mesh wants to be of all devices that there are, and is made anew where gradients are marked."""
    import torch_xla.runtime as xr

    real = xr.global_runtime_device_count
    xr.global_runtime_device_count = lambda: count
    try:
        yield
    finally:
        xr.global_runtime_device_count = real
