"""What the metrics of one run say: losses over steps and seconds, and whether it went wrong.

Owns: reading the curve, interpolation, what counts as divergence. Does not own: measuring (`training.loop`), several
runs (`compare_table`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

SPIKE = 1.25
"""A training loss so many times the median of those before it is a spike."""
_SPIKE_WINDOW = 5
RISE = 1.05
"""A last evaluation loss so many times the lowest one has risen again."""
AT_CHANCE = 0.99
"""Share of the chance level that a loss has to be below."""


@dataclass(frozen=True)
class Measured:
    """The curve of a run.

    Attributes:
        steps, losses: of the evaluations.
        training_steps, training_losses: of single batches, as they were logged.
        step_seconds: median over the log events; of the processor's time on a CPU, which neighbours do not disturb.
        wall_step_seconds: the same by the clock.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    training_steps: list[int] = field(default_factory=list)
    training_losses: list[float] = field(default_factory=list)
    step_seconds: float | None = None
    wall_step_seconds: float | None = None

    @property
    def seconds(self) -> list[float]:
        """Of training alone until each evaluation: steps times the median of a step, so that neither compilation nor
        evaluation, resumption or a busy machine count."""
        return [step * (self.step_seconds or math.nan) for step in self.steps]

    def loss_at(self, seconds: float) -> float | None:
        """The evaluation loss after so many seconds, on the line between the evaluations around; a run that was done
        before then has its last one, and before the first one there is None."""
        if self.losses and seconds >= self.seconds[-1]:
            return self.losses[-1]
        return interpolate(self.seconds, self.losses, seconds)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Measured":
        return cls(**{name: value for name, value in fields.items() if name != "seconds"})


def read_metrics(path: Path, processor_time: bool) -> Measured:
    """The curve in the `metrics.jsonl` of a run; None values, which stand for numbers that are none, become NaN.

    Args:
        processor_time: time steps by the processor's time.

    Raises:
        OSError: the file is not there.
        ValueError: it is damaged.
    """
    found, wall, processor = Measured(), [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "eval_loss" in row:
            found.steps.append(row["step"])
            found.losses.append(_number(row["eval_loss"]))
        if "loss" in row:
            found.training_steps.append(row["step"])
            found.training_losses.append(_number(row["loss"]))
        if "seconds_per_step" in row:
            wall.append(row["seconds_per_step"])
            processor.append(row["cpu_seconds_per_step"])
    by_clock = median(wall) if wall else None
    step_seconds = median(processor) if processor and processor_time else by_clock
    return Measured(
        found.steps, found.losses, found.training_steps, found.training_losses, step_seconds, by_clock
    )  # fmt: skip


def divergence(measured: Measured, chance: float | None, error: str | None = None) -> list[str]:
    """What went wrong with a run, in words; empty where nothing did.

    Args:
        chance: loss of a model that has learnt nothing; None: not known.
        error: what ended the run before its last step.
    """
    found = [error] if error else []
    losses = measured.losses
    if any(not math.isfinite(loss) for loss in [*losses, *measured.training_losses]) and not error:
        found.append("a loss that is not a number")
    if losses and math.isfinite(losses[-1]):
        if chance is not None and losses[-1] >= AT_CHANCE * chance:
            found.append(f"ends at chance ({losses[-1]:.3f} of {chance:.3f})")
        elif losses[-1] > RISE * min(losses):
            found.append(f"ends at {losses[-1]:.3f}, above its best of {min(losses):.3f}")
    seen = spikes(measured.training_losses)
    if seen:
        steps = ", ".join(str(measured.training_steps[index]) for index in seen[:5])
        found.append(f"{len(seen)} spike{'s' if len(seen) > 1 else ''} of the training loss (step {steps})")
    return found


def spikes(losses: Sequence[float]) -> list[int]:
    """Indices of losses far above those before them."""
    return [
        index
        for index in range(_SPIKE_WINDOW, len(losses))
        if losses[index] > SPIKE * median(losses[index - _SPIKE_WINDOW : index])
    ]


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The value at `x` of the line through the points, whose `xs` rise; None outside of them."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    for index, place in enumerate(xs):
        if place == x:
            return ys[index]
        if place > x:
            share = (x - xs[index - 1]) / (place - xs[index - 1])
            return ys[index - 1] + share * (ys[index] - ys[index - 1])
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
