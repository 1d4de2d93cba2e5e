"""Norms and histograms of parameters and gradients, which show a run that goes wrong before its loss does.

Owns: what is measured of which tensors. Does not own: when (`loop`), where it goes (`tracking`).
"""

import torch
from torch import Tensor, nn

from dalle_torch.tracking.base import Histogram

BINS = 64


class Observer:
    """Takes a look at gradients when it is told to, and at parameters with them.

    A step calls it when its gradients are done; what it keeps are tensors, read when they are asked for.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Measure every trained parameter and its gradient."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._seen[f"gradients/{name}"] = _measured(parameter.grad)
                self._seen[f"parameters/{name}"] = _measured(parameter)

    def take(self) -> dict[str, Histogram]:
        """What was seen, by name; waits for the device."""
        seen, self._seen = self._seen, {}
        return {name: _histogram(*values) for name, values in seen.items()}


def norms(histograms: dict[str, Histogram]) -> dict[str, float]:
    """The norm of all parameters and of all gradients together."""
    found = {}
    for kind in ("gradients", "parameters"):
        squares = [histogram.norm**2 for name, histogram in histograms.items() if name.startswith(f"{kind}/")]
        found[f"norm/{kind}"] = sum(squares) ** 0.5
    return found


def _measured(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts in `BINS` bins, the ends of the first and the last one, the norm: static shapes for any values."""
    values = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float().flatten()
    low, high = values.min(), values.max()
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    places = ((values - low) / width * BINS).nan_to_num(0.0).long().clamp(0, BINS - 1)
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device).index_add_(0, places, torch.ones_like(places))
    return counts, torch.stack([low, high]), values.norm()


def _histogram(counts: Tensor, ends: Tensor, norm: Tensor) -> Histogram:
    low, high = ends.tolist()
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    return Histogram(counts=tuple(counts.tolist()), edges=tuple(edges), norm=float(norm))
