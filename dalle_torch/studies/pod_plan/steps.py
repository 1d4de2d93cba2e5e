"""The training step of a configuration, traced for devices that are described.

Owns: what goes into a step where there are neither weights nor data. Does not own: the step (`training.step`), how it
is laid out (`training.setup`), tracing (`parallel.trace`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dalle_torch.config import RunConfig
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo
from dalle_torch.parallel.engine import plan_batches
from dalle_torch.parallel.mesh import BatchPlan
from dalle_torch.parallel.trace import TracedStep, TracingEngine
from dalle_torch.training.setup import place_training
from dalle_torch.training.step import TrainStep
from dalle_torch.training.trainable import choose_trained

WITH_ROOTS, PLAIN = "with roots", "without roots"


def trace_steps(
    config: RunConfig, network: DalleBartConfig, of_hosts: Sequence[Sequence[int]]
) -> Iterator[tuple[str, TracedStep]]:
    """Each kind of step that a run makes, with its name: with Shampoo two, with and without new preconditioners.

    Args:
        of_hosts: for each host the numbers of its devices.

    Raises:
        ValueError: mesh, batch or layout do not come out even, or the optimizer does not run on torch_xla.
    """
    engine = TracingEngine(config.mesh, of_hosts)
    batches = plan_batches(engine, config.training)
    with torch.device("meta"):
        model = DalleBart(network)
    choose_trained(model, config.model.train)
    called, optimizer = place_training(config, engine, model)
    engine.hold(_state(model, optimizer))
    engine.name_parts(model, optimizer)
    step = TrainStep(engine, model, called, optimizer, config.training)
    passes = [_batch(batches, network) for _ in range(config.training.accumulation_steps)]
    for kind in _kinds(optimizer):
        yield kind, engine.program(lambda: step(passes, config.optimizer.lr, config.optimizer.max_grad_norm))


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Of the first steps, in order; later ones are like these."""
    if not isinstance(optimizer, DistributedShampoo):
        return (PLAIN,)
    every_time = all(group["preconditioning_compute_steps"] == 1 for group in optimizer.param_groups)
    return (WITH_ROOTS,) if every_time else (WITH_ROOTS, PLAIN)


def _state(model: DalleBart, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the devices keep of the optimizer, by name."""
    if isinstance(optimizer, DistributedShampoo):
        found = optimizer.stacks()
    else:
        found = {
            f"{kind} of {name}": value
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state.get(parameter, {}).items()
        }
    return {name: value for name, value in found.items() if value.device.type == "xla"}


def _batch(batches: BatchPlan, network: DalleBartConfig) -> dict[str, Tensor]:
    """Rows of a host as `data.loader` makes them; their values go nowhere."""
    text = torch.zeros(batches.per_host, network.max_text_length, dtype=torch.int64)
    image = torch.zeros(batches.per_host, network.image_length, dtype=torch.int64)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": image}
