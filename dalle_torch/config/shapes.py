"""The embedded model from nothing: captioned shapes, their codebook, what pictures are worth."""

from dataclasses import dataclass, field
from typing import Any

from dalle_torch.config.checks import below, not_finite, refuse
from dalle_torch.config.optimizer import OptimizerConfig
from dalle_torch.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class CropPhase:
    """A stretch of a codebook's training on pictures of one size."""

    steps: int
    batch_size: int
    crop: int
    """Side of the square that is cut out of each picture, around some edge; the picture's side takes it whole."""

    def __post_init__(self) -> None:
        refuse("phase", not_finite(self) + below(self, 1, "steps", "batch_size", "crop"))


@dataclass(frozen=True, kw_only=True)
class VQGANTrainingConfig:
    """Training of a codebook (arXiv 1711.00937) without adversary."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    phases: list[CropPhase] = field(default_factory=lambda: [CropPhase(steps=1000, batch_size=16, crop=64)])
    seed: int = 0
    continuous_steps: int = 200
    """First steps, without quantization; the codebook then starts from the latents' k-means centres."""
    restart_every: int = 50
    """Steps between looks for codes that were not used since the last one; they restart from random latents."""
    restart_until: float = 0.6
    """Share of the run after which codes restart no more."""
    square_weight: float = 1.0
    """Weight of the squared error beside the absolute one."""
    minority_weight: float = 1.0
    """How much more pixels count that differ from their picture's median colour."""
    edge_weight: float = 1.0
    """Weight of the absolute error of differences between neighbouring pixels."""
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        problems = below(self, 1, "restart_every", "log_every", "save_every")
        problems += below(self, 0, "continuous_steps", "square_weight", "edge_weight", "minority_weight")
        if not self.phases:
            problems.append("phases is empty")
        if self.optimizer.schedule == "plateau":
            problems.append("optimizer.schedule=plateau needs evaluations, and there are none here: take another one")
        if not 0 <= self.restart_until <= 1:
            problems.append(f"restart_until={self.restart_until} must lie in [0, 1]")
        refuse("vqgan_training", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class ShapesDataConfig:
    """Captioned shapes (`shapes.drawing`) as training data."""

    scenes: int = 50_000
    """Scenes in a pass; they are drawn and encoded once."""
    seed: int = 1
    single: float = 0.4
    """Share of scenes with one part."""
    leave_out: float = 0.1
    """Share of sizes, places and backgrounds that the captions leave open."""
    open_shapes: float = 0.25
    """Share of shapes that the captions leave open."""
    blank: float = 0.1
    """Share of samples whose caption is blanked, for super conditioning."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "scenes")
        problems += [
            f"{name}={getattr(self, name)} must lie in [0, 1]"
            for name in ("single", "leave_out", "open_shapes", "blank")
            if not 0 <= getattr(self, name) <= 1
        ]
        refuse("data", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluationConfig:
    """How pictures are drawn that are checked against their captions while a model trains."""

    prompts: int = 32
    """Prompts of each kind, with pairs that were trained on and with pairs that were not."""
    seed: int = 12345
    condition_scale: float = 3.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        refuse("evaluation", not_finite(self) + below(self, 1, "prompts") + below(self, 0, "temperature"))


@dataclass(frozen=True, kw_only=True)
class ShapesJudgeConfig:
    """Training of the classifier that judges drawn pictures."""

    steps: int = 1000
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 7
    reconstructed: int = 800
    """Pictures that go through the codebook once; further ones are drawn anew at each step."""
    validation: int = 256
    """Scenes by which its accuracy is told in the end."""

    def __post_init__(self) -> None:
        problems = (
            below(self, 1, "steps") + below(self, 2, "batch_size") + below(self, 4, "reconstructed", "validation")
        )
        if self.lr <= 0:
            problems.append(f"lr={self.lr} must be above 0")
        refuse("judge", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """One complete run of the embedded model: codebook, codes, model."""

    model: dict[str, Any]
    """Keys of `DalleBartConfig`; the sizes of both vocabularies are filled in."""
    vqgan: dict[str, Any]
    """Keys of `VQGANConfig`."""
    vqgan_training: VQGANTrainingConfig = field(default_factory=VQGANTrainingConfig)
    data: ShapesDataConfig = field(default_factory=ShapesDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: ShapesEvaluationConfig = field(default_factory=ShapesEvaluationConfig)
    judge: ShapesJudgeConfig = field(default_factory=ShapesJudgeConfig)
