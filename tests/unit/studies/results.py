"""Results of runs that were never run."""

from collections.abc import Sequence
from typing import Any

from dalle_torch.studies.compare_measure import Measured
from dalle_torch.studies.compare_table import Result


def fields_of(losses: Sequence[float], step_seconds: float = 0.5, error: str | None = None) -> dict[str, Any]:
    """A `result.json` of a run with an evaluation every ten steps."""
    steps = [10 * (index + 1) for index in range(len(losses))]
    measured = Measured(steps, list(losses), [], [], step_seconds, 2 * step_seconds)
    return {
        "parameters": 1000, "error": error, "measured": measured.to_json(), "peak_memory": 300 * 2**20,
        "memory_at_start": 100 * 2**20, "device": "cpu", "machine": "x86_64", "threads": 1,
        "versions": {"torch": "2.9.0"},
    }  # fmt: skip


def result(
    row: str, seed: int, losses: Sequence[float], step_seconds: float = 0.5, lr: float = 0.1, error: str | None = None
) -> Result:
    fields = fields_of(losses, step_seconds, error)
    return Result.from_json(f"{row}-seed{seed}", row, seed, lr, {"training": {"steps": 30}}, fields)
