"""Length of a run, its devices, and what is written while it goes."""

from dataclasses import dataclass
from typing import Literal

from dalle_torch.config.checks import below, not_above, not_finite, refuse, seeds


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of a run, its batches, and what is written while it goes."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 64
    """Samples of one forward and backward pass."""
    accumulation_steps: int = 1
    """Passes whose gradients make one update."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """What forward and backward passes compute in; weights, optimizer and loss stay in float32."""
    compile: bool = False
    """Run them through `torch.compile`: about a minute to start, then faster. Not for torch_xla, which compiles."""
    gradient_checkpointing: bool = False
    """Keep of each layer its input alone and compute the rest again in the backward pass: less memory, more time."""
    use_scan: bool = False
    """On torch_xla, compile one layer of each stack and loop over it: compile time that does not grow with depth."""
    log_every: int = 50
    eval_every: int = 1000
    eval_batches: int | None = None
    """Batches of each evaluation set that are measured; null: all."""
    save_every: int = 1000
    histogram_every: int | None = None
    """Updates between looks at norms and histograms of parameters and gradients, which wait for the device; null:
    none."""
    peak_tflops: float | None = None
    """What a device can do at most at `precision`, in 10^12 operations a second, for the model flops utilisation; null:
    known for NVIDIA and TPU devices, else not reported."""

    def __post_init__(self) -> None:
        names = ["steps", "batch_size", "accumulation_steps", "log_every", "eval_every", "save_every"]
        optional = ("eval_batches", "histogram_every")
        names += [name for name in optional if getattr(self, name) is not None]
        refuse(
            "training",
            not_finite(self) + below(self, 1, *names) + not_above(self, 0, "peak_tflops") + seeds(self, "seed"),
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of a run as a mesh of dp x mp (`parallel.mesh`)."""

    dp: int | None = None
    """Copies of the model, each with its own samples; null: as many as there are devices for."""
    mp: int = 1
    """Devices that a copy is split over; a divisor of the number of devices of a host."""
    uneven: Literal["refuse", "pad"] = "refuse"
    """What becomes of vocabularies and inner sizes that mp does not divide: an error that names them, or parts that are
    filled up to equal size (`parallel.rules`)."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "mp") + ([] if self.dp is None else below(self, 1, "dp"))
        if self.uneven not in ("refuse", "pad"):
            problems.append(f"uneven={self.uneven!r} is not one of refuse, pad")
        refuse("mesh", not_finite(self) + problems)
