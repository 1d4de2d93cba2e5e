"""Small states of a run, and a process that saves them until it is killed."""

import itertools
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from dalle_torch.checkpoint import CheckpointFolder


def state(step: int = 0, *, big: int = 0) -> dict[str, Tensor]:
    """Tensors of all sorts, other ones for each step."""
    generator = torch.Generator().manual_seed(step)
    found: dict[str, Tensor] = {
        "model/weight": torch.randn(7, 5, generator=generator),
        "model/transposed": torch.randn(6, 4, generator=generator).t(),
        "model/part": torch.randn(100, 3, generator=generator)[10:20],
        "model/half": torch.randn(9, generator=generator).bfloat16(),
        "model/parameter": torch.nn.Parameter(torch.randn(3, 3, generator=generator)),
        "optimizer/weight/step": torch.tensor(float(step)),
        "optimizer/weight/quantized": torch.randint(-128, 128, (4, 4), generator=generator).to(torch.int8),
        "optimizer/weight/mask": torch.rand(5, generator=generator) > 0.5,
        "optimizer/weight/empty": torch.zeros(0, 3),
        "optimizer/weight/double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
    }
    if big:
        found["model/big"] = torch.randn(big, generator=generator)
    return found


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def save_for_ever(folder: Path, first: int, asynchronous: bool, told: Connection) -> None:
    """Tells the step of each checkpoint once it is committed."""
    checkpoints = CheckpointFolder(str(folder), keep=2)
    for step in itertools.count(first):
        checkpoints.save(step, state(step), {"step": step}, {"host": 0}, asynchronous=asynchronous)
        if asynchronous:
            checkpoints.wait()
        told.send(step)
