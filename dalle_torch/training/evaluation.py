"""The loss on evaluation sets, each measured apart.

Owns: the mean over samples. Does not own: the sets (`data`), when they are measured (`loop`).
"""

from collections.abc import Mapping
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_torch.data.loader import TokenLoader
from dalle_torch.log import progress
from dalle_torch.parallel.engine import Engine, Precision

EVALUATION_LOSS = "eval_loss"
"""The mean over the sets, which the schedule "plateau" goes by; that of one set is `eval_loss/NAME`."""


@torch.no_grad()
def evaluation_losses(
    engine: Engine,
    model: nn.Module,
    loaders: Mapping[str, TokenLoader],
    precision: Precision = "float32",
    batches: int | None = None,
) -> dict[str, float]:
    """The mean cross entropy over the image tokens of each set; the mode of `model` is as before afterwards.

    Args:
        batches: of each set that are measured; None: all.
    """
    training = model.training
    model.eval()
    losses = {name: _mean_loss(engine, model, loader, precision, batches) for name, loader in loaders.items()}
    model.train(training)
    found = {f"{EVALUATION_LOSS}/{name}": loss for name, loss in losses.items()}
    if losses:
        found[EVALUATION_LOSS] = sum(losses.values()) / len(losses)
    return found


def _mean_loss(
    engine: Engine, model: nn.Module, loader: TokenLoader, precision: Precision, batches: int | None
) -> float:
    total: Tensor | None = None
    count = loader.steps if batches is None else min(batches, loader.steps)
    for batch in progress(islice(iter(loader), count), total=count, desc="evaluating", unit="batch"):
        rows = engine.put([batch.inputs | {"valid": batch.valid[:, None].long()}])[0]
        valid = rows.pop("valid")[:, 0].float()
        labels = rows["labels"]
        with engine.autocast(precision):
            logits = model(**rows).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        sums = torch.stack([(losses.view(labels.shape).mean(1) * valid).sum(), valid.sum()])
        total = sums if total is None else total + sums
        engine.end_step()
    assert total is not None, "a set without samples is refused when it is looked for"
    loss, samples = engine.mean(total).tolist()
    return loss / samples
