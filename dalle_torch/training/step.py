"""One update of the weights.

Owns: clipping, precision, `train_step`. Does not own: optimizers and learning rates (`optim`), data, evaluation,
checkpoints (`loop`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalle_torch.config import TrainingConfig

Batch = dict[str, Tensor]
Forward = Callable[..., Any]
"""Takes a batch's tensors by name, as the model does; its result has a `loss`."""


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


class TrainStep:
    """One update of a run on an engine.  (temporary)"""

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
    ) -> None:
        self.engine, self.model, self.network, self.optimizer, self.config = engine, model, network, optimizer, config
        self._call = engine.compiled(network) if config.compile else network

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        max_grad_norm: float | None,
        observe: Callable[[nn.Module], None] | None = None,
    ) -> dict[str, Tensor]:
        losses = []
        for i, batch in enumerate(batches):
            with self.engine.accumulating(self.network, i == len(batches) - 1):
                with self.engine.autocast(self.config.precision):
                    loss = self._call(**batch).loss / len(batches)
                loss.backward()
            losses.append(loss.detach())
        self.engine.gradients_done(self.model)
        norm = self.engine.clip(self.model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
        if observe is not None:
            observe(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = self.engine.scalar(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.end_step()
        return {"loss": torch.stack(losses).sum(), "grad_norm": norm.detach()}
