"""One update of the weights.

Owns: `TrainStep`, the same on all devices, and `train_step`, for one without an engine. Does not own: what has to be
done differently on devices (`parallel.engine`), optimizers and learning rates (`optim`), data, evaluation, checkpoints
(`loop`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalle_torch.config import TrainingConfig
from dalle_torch.parallel.engine import Engine

Batch = dict[str, Tensor]
Forward = Callable[..., Any]
"""Takes a batch's tensors by name, as the model does; its result has a `loss`."""


class TrainStep:
    """Updates of a model on an engine's devices, each from the mean loss over batches whose samples are equally many.

    Nothing here waits for the devices. On torch_xla everything from the first batch to the last parameter is one
    program, which is compiled at the first call and once more for updates that do more than others (Shampoo's roots).

    Args:
        model: the bare model, after `engine.place`.
        called: what `engine.place` returned.
        optimizer: made with `engine.optimizer_options`, and prepared.
        config: precision, compilation, gradient checkpointing and scan.

    Raises:
        ValueError: the layers cannot be run as `config` says.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        called: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
    ) -> None:
        self.engine = engine
        self.model = model
        self.optimizer = optimizer
        self._called = called
        self._precision = config.precision
        engine.set_up_layers(model, checkpoint=config.gradient_checkpointing, scan=config.use_scan)
        self._forward: Forward = engine.compiled(called) if config.compile else called

    def __call__(
        self,
        batches: Sequence[Batch],
        lr: float,
        max_grad_norm: float | None = None,
        observe: Callable[[nn.Module], None] | None = None,
    ) -> dict[str, Tensor]:
        """One update.

        Args:
            batches: this process' rows of each, in the host's memory; more than one accumulates gradients.
            lr: learning rate of all groups.
            max_grad_norm: gradients whose norm is larger are scaled down to it; None: never.
            observe: is shown the model with its gradients, before that.

        Returns:
            "loss" and "grad_norm" (before clipping) of all processes' rows, each a detached tensor []. To read one
            waits for the update.
        """
        engine, losses = self.engine, []
        placed = engine.put(batches)
        for index, batch in enumerate(placed):
            with engine.accumulating(self._called, last=index == len(placed) - 1):
                with engine.autocast(self._precision):
                    loss = self._forward(**batch).loss / len(placed)
                loss.backward()
            losses.append(loss.detach())
        engine.gradients_done(self.model)
        if observe is not None:
            observe(self.model)
        norm = engine.clip(self.model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
        rate = engine.scalar(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = engine.mean(torch.stack(losses).sum())
        engine.end_step()
        return {"loss": loss, "grad_norm": norm.detach()}


def apply_gradients(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float | None
) -> Tensor:
    """Clip, update and clear the gradients; returns their norm before clipping, a tensor [] on the device."""
    parameters = list(parameters)
    limit = math.inf if max_grad_norm is None else max_grad_norm
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def forward_pass(model: nn.Module, config: TrainingConfig) -> Forward:
    """`model` as `train_step` calls it: compiled, and in mixed precision, if `config` says so."""
    call: Forward = torch.compile(model) if config.compile else model
    if config.precision == "float32":
        return call
    device = next(model.parameters()).device.type

    def mixed(**batch: Tensor) -> Any:
        with torch.autocast(device, getattr(torch, config.precision)):
            return call(**batch)

    return mixed


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    max_grad_norm: float | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """One update from the mean loss over `batches`, whose samples are equally many.

    Nothing here waits for the device: the metrics are tensors, to be read when they are logged.

    Args:
        batches: what `model(**batch).loss` takes; more than one accumulates gradients.
        forward: what `forward_pass` made of `model`; None: `model` itself.

    Returns:
        "loss" and "grad_norm" (before clipping), each a detached tensor [].
    """
    losses = []
    for batch in batches:
        loss = (forward or model)(**batch).loss / len(batches)
        loss.backward()
        losses.append(loss.detach())
    norm = apply_gradients(model.parameters(), optimizer, lr, max_grad_norm)
    return {"loss": torch.stack(losses).sum(), "grad_norm": norm.detach()}
