"""Distributed Shampoo as a `torch.optim.Optimizer`.

Owns: parameter groups, the clock of each parameter, when roots are taken. Does not own: settings' bounds (`options`),
the update (`bucket`, `update`), state by name (`saving`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_torch.optim.shampoo import saving
from dalle_torch.optim.shampoo.blocking import regions
from dalle_torch.optim.shampoo.bucket import Bucket, preconditioned_shape
from dalle_torch.optim.shampoo.factors import Factors, factors
from dalle_torch.optim.shampoo.group import Group
from dalle_torch.optim.shampoo.options import GraftType, RootMethod, ShampooOptions
from dalle_torch.optim.shampoo.preconditioner import RegionMatrices, update_roots
from dalle_torch.optim.shampoo.sharding import OneDevice, Sharding
from dalle_torch.optim.shampoo.update import Now

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


_STACK_ELEMENTS = 1 << 28
"""Of the parameters that are updated together on torch_xla: 64 of Mega's attention, whose 256 blocks are one for each
core of the pod it was trained on."""


class DistributedShampoo(torch.optim.Optimizer):
    """Distributed Shampoo (Anil et al., arXiv 2002.09018), as DALL·E Mega was trained with it.

    Adam divides each entry of the gradient by a running size of that entry. Shampoo keeps, for a weight [m, n], the
    running m x m and n x n second moments L and R of the gradient's rows and columns, and turns the gradient G into
    L^(-1/4) G R^(-1/4), which takes account of how entries move together. Only the direction of that is used: its
    length is that of the update of a diagonal method which runs beside it ("grafting"), so learning rates that suit
    RMSprop or Adam are where to start. Large weights are cut into blocks, and the roots are taken every few steps.

    State per parameter, float32: `momentum`; `diagonal_statistics` if the graft type has them; for preconditioned
    parameters also `diagonal_momentum`, `statistics.R.D` and `preconditioners.R.D` (matrices of region R of the blocks,
    dimension D); and the counts `step`, `root_failures` (roots that failed, so that the old one stayed) and
    `nonfinite_gradients`. On torch_xla tensors of several parameters stay together, and `state_dict` takes them apart.

    Args:
        params: parameters, groups of them, or `model.named_parameters()`, which makes the state dict carry names. Every
            other argument can differ between groups.
        lr: learning rate, a number or a tensor of one; as of Adam. Schedulers of torch work.
        block_size: weights are cut into blocks of at most this many rows and columns. Larger sees more of how entries
            move together; state grows with it, and the time of a root with its cube.
        beta1: of the momentum, which here averages the finished update, not the gradient.
        beta2: of both second moments, the matrices' and the grafting method's; 1 adds up and forgets nothing.
        diagonal_epsilon: added to the root that the grafting method divides by, as Adam's eps.
        matrix_epsilon: added to the matrices' diagonal before a root, relative to the largest eigenvalue. Larger is
            more cautious where little was seen, and nearer to the plain gradient.
        weight_decay: times the parameter is added to the update; see `decoupled_weight_decay`.
        start_preconditioning_step: update from which on the Shampoo direction is used; before it, the grafting
            method's. None: 101, or one more than `preconditioning_compute_steps` if that is more.
        preconditioning_compute_steps: updates between roots. Most of the time of a small setting goes into roots.
        statistics_compute_steps: updates between looks at the gradient for the matrices.
        best_effort_shape_interpretation: join neighbouring small dimensions first, see `merge_small_dims_block_size`.
        graft_type: the diagonal method: "rmsprop", "adagrad", the two with `_normalized` (the gradient is divided by
            its norm first), "sgd", or "sqrt_n" (the sign).
        nesterov: look ahead along the momentum.
        exponent_override: p of the roots matrix^(-1/p) instead of twice the number of the block's dimensions; 0: off.
        inverse_failure_threshold: a root by Newton's iteration with a larger error is not used; the old one stays.
        moving_average_for_momentum: updates enter the momentum times (1 - beta1); without, the momentum is up to
            1 / (1 - beta1) times as long, and so is the step.
        skip_preconditioning_dim_size_gt: parameters with a larger dimension (embeddings) take the grafting update.
        merge_small_dims_block_size: dimensions are joined while their product stays within this.
        clip_by_scaled_gradient_norm: largest root mean square of the rmsprop update; None: no limit.
        best_effort_memory_usage_reduction: momenta of matrices in 8 bits.
        decoupled_learning_rate: the learning rate multiplies the finished step, as in Adam. Without, it multiplies the
            grafting update, before momentum.
        decoupled_weight_decay: the parameter is shrunk beside the momentum, by the square of the learning rate times
            `weight_decay` (the original's way; AdamW's has no square), not through it.
        root_method: "newton" is made of matrix products, "eigh" of eigenvalues; "auto" takes eigh on a CPU.
        skip_nonfinite_gradients: a gradient with a NaN or an infinity, or whose norm overflows float32, counts as zero,
            so that it gets into no state.
        sharding: how state lies on several devices.
        compile: parameters that are not preconditioned (embeddings) are updated by code that `torch.compile` makes, in
            a third of the time; the first step takes that many seconds longer. Not on torch_xla, which compiles anyway.

    Raises:
        ValueError: settings are out of range, or parameters are not real floating-point numbers; all are named.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        block_size: int = 1024,
        beta1: float = 0.9,
        beta2: float = 0.999,
        diagonal_epsilon: float = 1e-10,
        matrix_epsilon: float = 1e-6,
        weight_decay: float = 0.0,
        start_preconditioning_step: int | None = None,
        preconditioning_compute_steps: int = 10,
        statistics_compute_steps: int = 1,
        best_effort_shape_interpretation: bool = True,
        graft_type: GraftType = "rmsprop_normalized",
        nesterov: bool = False,
        exponent_override: int = 0,
        inverse_failure_threshold: float = 0.1,
        moving_average_for_momentum: bool = True,
        skip_preconditioning_dim_size_gt: int = 4096,
        merge_small_dims_block_size: int = 4096,
        clip_by_scaled_gradient_norm: float | None = None,
        best_effort_memory_usage_reduction: bool = False,
        decoupled_learning_rate: bool = True,
        decoupled_weight_decay: bool = False,
        root_method: RootMethod = "auto",
        skip_nonfinite_gradients: bool = True,
        sharding: Sharding | None = None,
        compile: bool = False,
    ) -> None:
        self._sharding = sharding or OneDevice()
        self._compile = compile
        self._buckets: list[list[Bucket]] = []
        defaults = {
            "lr": lr,
            "block_size": block_size,
            "betas": (beta1, beta2),
            "diagonal_epsilon": diagonal_epsilon,
            "matrix_epsilon": matrix_epsilon,
            "weight_decay": weight_decay,
            "start_preconditioning_step": start_preconditioning_step,
            "preconditioning_compute_steps": preconditioning_compute_steps,
            "statistics_compute_steps": statistics_compute_steps,
            "best_effort_shape_interpretation": best_effort_shape_interpretation,
            "graft_type": graft_type,
            "nesterov": nesterov,
            "exponent_override": exponent_override,
            "inverse_failure_threshold": inverse_failure_threshold,
            "moving_average_for_momentum": moving_average_for_momentum,
            "skip_preconditioning_dim_size_gt": skip_preconditioning_dim_size_gt,
            "merge_small_dims_block_size": merge_small_dims_block_size,
            "clip_by_scaled_gradient_norm": clip_by_scaled_gradient_norm,
            "best_effort_memory_usage_reduction": best_effort_memory_usage_reduction,
            "decoupled_learning_rate": decoupled_learning_rate,
            "decoupled_weight_decay": decoupled_weight_decay,
            "root_method": root_method,
            "skip_nonfinite_gradients": skip_nonfinite_gradients,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; their clocks start at zero.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1] = Group(self.param_groups[-1])
        if group["start_preconditioning_step"] is None:
            interval = group["preconditioning_compute_steps"]
            # What is no number is told below, with all else that is out of range.
            group["start_preconditioning_step"] = max(interval + 1, 101) if isinstance(interval, int) else 101
        try:
            ShampooOptions.of_group(group)
            saving.check_parameters(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._buckets.append([])

    def prepare(self) -> None:
        """Create the state of every parameter that asks for a gradient, as the first step would.

        Where steps are compiled this keeps the first one equal to the others.
        """
        for index, group in enumerate(self.param_groups):
            self._place(index, [parameter for parameter in group["params"] if parameter.requires_grad])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Nothing here waits for a device, save for what `torch.linalg.eigh` does on CUDA when roots are due and
        `root_method` is "eigh". Which kind of step it is, is decided by the host, by its count of updates; so a CUDA
        graph can hold no more than one kind.

        Args:
            closure: computes the loss and its gradients; what it returns is returned.

        Raises:
            ValueError: gradients are sparse or complex, or a setting was changed to something out of range, or changed
                after the state was made of it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        saving.check_gradients(self.param_groups)
        of_groups = self.check()
        for index, (group, options) in enumerate(zip(self.param_groups, of_groups, strict=True)):
            self._place(index, [parameter for parameter in group["params"] if parameter.grad is not None])
            self._part(index)
            due, by_device = [], {}
            for bucket in self._buckets[index]:
                if bucket.has_gradients:
                    place = bucket.parameters[0].device, bucket.in_one_pass
                    if place not in by_device:
                        by_device[place] = factors(options, *place)
                    now = _now(bucket, options, by_device[place])
                    bucket.update(options, now)
                    due += [bucket] if now.roots_due and bucket.matrices else []
            if due:
                self._update_roots(group, options, due)
        return loss

    def check(self) -> list[ShampooOptions]:
        """The settings of each group, as the next step will take them.

        Raises:
            ValueError: a setting was changed to something out of range, or to what does not go with the state there is.
        """
        of_groups = [ShampooOptions.of_group(group) for group in self.param_groups]
        for index, (options, buckets) in enumerate(zip(of_groups, self._buckets, strict=True)):
            if changed := {problem for bucket in buckets for problem in bucket.changed(options)}:
                problems = "; ".join(sorted(changed))
                raise ValueError(f"parameter group {index} was changed to {problems}: leave it as it was")
        return of_groups

    @property
    def roots_due(self) -> bool:
        """Whether the next step takes roots: of the two kinds of steps, which one it is."""
        return any(
            bucket.matrices and bucket.updates % group["preconditioning_compute_steps"] == 0
            for group, buckets in zip(self.param_groups, self._buckets, strict=True)
            for bucket in buckets
        )

    def stacks(self) -> dict[str, Tensor]:
        """The state's tensors as they are kept, several parameters in each, by names that tell kind and shape."""
        buckets = [bucket for of_group in self._buckets for bucket in of_group]
        return {
            f"{kind} of {len(bucket.parameters)} x {list(bucket.parameters[0].shape)} ({number})": tensor
            for number, bucket in enumerate(buckets)
            for kind, tensor, _ in bucket.tensors()
        }

    def state_stacks(self) -> list[saving.StateStack]:
        """The same with which parameters' they are, for a checkpoint."""
        return saving.stacks_by_name(self.param_groups, [bucket for of_group in self._buckets for bucket in of_group])

    def counts(self) -> dict[str, int]:
        """How often roots failed and gradients were not finite, over all parameters; waits for the device."""
        buckets = [bucket for of_group in self._buckets for bucket in of_group]
        names = ("root_failures", "nonfinite_gradients")
        if not buckets:
            return dict.fromkeys(names, 0)
        sums = [torch.stack([bucket.stacks[name].sum() for bucket in buckets]).sum() for name in names]
        return dict(zip(names, torch.stack(sums).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name, or by position for parameters that came without, and the settings of the groups.

        Tensors are the state itself, not copies. Those of one storage do not overlap, so safetensors takes them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = saving.named_state(self.param_groups, self._buckets)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take over a state, on whatever devices the parameters are, and what may change in a run of the settings.

        Parameters are found by name, so they can be in other groups than before. Where only one side has names they
        are found by position, as torch does.

        Raises:
            ValueError: it is of other parameters or settings than these; all are named, with both values.
        """
        for bucket, states, started in self._opened(state_dict):
            bucket.load(states, started)

    def open_state(self, state_dict: Mapping[str, Any]) -> list[saving.StateStack]:
        """Make room for a state, as `load_state_dict` does, but leave it to the caller to fill it.

        Args:
            state_dict: its tensors can be on the meta device, save for the counts `step`.

        Returns:
            Every tensor of the state, the counts too, as they are kept here.

        Raises:
            ValueError: as `load_state_dict`.
        """
        buckets = []
        for bucket, states, started in self._opened(state_dict):
            bucket.set_clock(int(states[0]["step"]), started)
            buckets.append(bucket)
        return saving.stacks_by_name(self.param_groups, buckets)

    def _opened(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Bucket, list[dict[str, Tensor]], bool]]:
        """Make buckets as a state has them, and give them out with what goes into each, to be filled at once."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        found = saving.checked(self.param_groups, state_dict)
        self._buckets = [[] for _ in self.param_groups]
        self.state.clear()
        for index, (group, of_group) in enumerate(zip(self.param_groups, found, strict=True)):
            by_clock = defaultdict(list)
            for parameter in group["params"]:
                if parameter in of_group:
                    saved = of_group[parameter]
                    by_clock[int(saved.state["step"]), saved.started].append(parameter)
            for (_, started), together in by_clock.items():
                for bucket in self._place(index, together):
                    yield bucket, [of_group[parameter].state for parameter in bucket.parameters], started
        saving.take_over_settings(self.param_groups, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_buckets", "_sharding", "_compile")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies of views are no views of the copy.
        self.state.clear()
        for buckets in self._buckets:
            self._show(buckets)

    def _show(self, buckets: Iterable[Bucket]) -> None:
        """Make the state of parameters readable where torch's tools look for it."""
        for bucket in buckets:
            for index, parameter in enumerate(bucket.parameters):
                # On torch_xla a view that is kept is a copy in the device's memory; the clock is the host's.
                xla = parameter.device.type == "xla"
                self.state[parameter] = {"step": bucket.clock[index]} if xla else bucket.state_of(index)

    def _place(self, index: int, parameters: list[Tensor]) -> list[Bucket]:
        """Create the state of those parameters of a group that have none."""
        placed = {id(parameter) for bucket in self._buckets[index] for parameter in bucket.parameters}
        together = defaultdict(list)
        for parameter in parameters:
            if id(parameter) not in placed and parameter.numel():
                kind = (parameter.shape, parameter.dtype, parameter.device, self._sharding.layout_of(parameter))
                together[kind].append(parameter)
        options = ShampooOptions.of_group(self.param_groups[index])
        if self._compile and any(parameter.device.type == "xla" for parameter in parameters):
            raise ValueError("compile=True is not for torch_xla, which compiles whole steps by itself: leave it out")
        parts = [part for of_kind in together.values() for part in _parts(of_kind)]
        new = [Bucket(part, options, self._sharding, self._compile) for part in parts]
        self._show(new)
        self._buckets[index] += new
        return new

    def _part(self, index: int) -> None:
        """Give parameters that have no gradient now a clock of their own, beside those of their shape that have one."""
        before = self._buckets[index]
        after = [part for bucket in before for part in bucket.parted()]
        if len(after) != len(before):
            self._buckets[index] = after
            self._show(after)

    def _update_roots(self, group: Mapping[str, Any], options: ShampooOptions, due: list[Bucket]) -> None:
        method = options.root_method
        if method == "auto":
            # A CPU finds eigenvalues in a tenth of the operations; elsewhere products are what is fast.
            method = "eigh" if due[0].parameters[0].device.type == "cpu" else "newton"
        by_exponent: dict[int, list[RegionMatrices]] = defaultdict(list)
        for bucket in due:
            assert bucket.merged is not None
            by_exponent[options.exponent_override or 2 * len(bucket.merged)] += bucket.matrices
        largest = _largest_block(group["params"], options)
        for p, matrices in by_exponent.items():
            update_roots(matrices, options, method, largest, p)


def _parts(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters of one shape, as an update takes them at once: on torch_xla all that it makes of them is in memory."""
    if parameters[0].device.type != "xla":
        return [parameters]
    most = max(1, _STACK_ELEMENTS // parameters[0].numel())
    return [parameters[start : start + most] for start in range(0, len(parameters), most)]


def _now(bucket: Bucket, options: ShampooOptions, of_device: Factors) -> Now:
    started: bool | Tensor = bucket.updates >= options.start_preconditioning_step
    device = bucket.parameters[0].device
    return Now(
        factors=of_device,
        # As a constant of the graph it would make two of it.
        started=torch.tensor(started).to(device) if device.type == "xla" else started,
        statistics_due=bucket.updates % options.statistics_compute_steps == 0,
        roots_due=bucket.updates % options.preconditioning_compute_steps == 0,
    )


def _largest_block(parameters: Iterable[Tensor], options: ShampooOptions) -> int:
    """Side of the largest matrix that any parameter of a group has or would have."""
    shapes = {preconditioned_shape(parameter.shape, options) for parameter in parameters}
    return max(
        size for shape in shapes if shape for region in regions(shape, options.block_size) for size in region.sizes
    )
