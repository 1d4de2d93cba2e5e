"""The options of a run, as dataclasses: what a file of `configs/train` may say, checked as a whole.

Owns: names, defaults and bounds. Does not own: reading files and overrides (`config_io`), the networks' own options
(`models.configuration`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def _raise(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{owner} cannot be used: " + "; ".join(problems))


def _below(config: object, bound: float, *names: str) -> list[str]:
    return [
        f"{name}={getattr(config, name)} must be at least {bound:g}" for name in names if getattr(config, name) < bound
    ]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), its learning rate over time, and gradient clipping."""

    lr: float = 1e-3
    """Highest learning rate, at the end of the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls from there to `final_lr` at the last step."""
    final_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices and kernels alone; norms, biases and embeddings of positions are left free."""
    max_grad_norm: float | None = 1.0
    """Gradients whose norm is larger are scaled down to it; null: never."""

    def __post_init__(self) -> None:
        problems = _below(self, 0, "lr", "final_lr", "warmup_steps", "eps", "weight_decay")
        problems += [
            f"{name}={getattr(self, name)} must lie in [0, 1)"
            for name in ("beta1", "beta2")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            problems.append(f"max_grad_norm={self.max_grad_norm} must be above 0, or null")
        _raise("optimizer", problems)


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
    """Run them through `torch.compile`: about a minute to start, then faster."""
    log_every: int = 50
    eval_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    """Newest checkpoints that stay."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "accumulation_steps", "log_every", "eval_every", "save_every", "keep")
        _raise("training", _below(self, 1, *names))


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
        problems = _below(self, 1, "mp") + ([] if self.dp is None else _below(self, 1, "dp"))
        if self.uneven not in ("refuse", "pad"):
            problems.append(f"uneven={self.uneven!r} is not one of refuse, pad")
        _raise("mesh", problems)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards of tokens (`data.loader`) as training data."""

    train: list[str] = field(default_factory=list)
    """Paths, URLs, folders, braces and globs, of what `dalle-torch encode` wrote or of parquet files."""
    evaluation: dict[str, list[str]] = field(default_factory=dict)
    """The same for any number of sets that are measured apart, by name; read as they lie, nothing is filtered."""
    seed: int = 0
    lanes: int = 8
    """Streams that batches are put together from: the order of samples depends on it, and not on hosts and workers,
    which share the lanes. A multiple of the number of hosts, and a divisor of the batch size over all hosts."""
    workers: int = 2
    """Processes of a host that read and tokenise, no more than it has lanes; 0: the training process does."""
    shuffle_buffer: int = 8192
    """Samples over all lanes that are shuffled among each other, beside the order of shards; 0 keeps the order."""
    blank_caption_prob: float = 0.0
    """Share of captions that are blanked, for super conditioning."""
    min_clip_score: float | None = None
    """Samples whose `clip_score` is lower, or that have none, are left out."""
    max_clip_score: float | None = None
    filter_column: str | None = None
    """Column of parquet, or key of the shards' JSON, that must be equal to `filter_value`."""
    filter_value: str | int | float | bool | None = None
    caption_column: str = "caption"
    encoding_column: str = "encoding"
    """Columns of parquet files."""
    max_bad_fraction: float = 0.01
    """Share of samples that may be unusable before the run stops."""

    def __post_init__(self) -> None:
        problems = _below(self, 1, "lanes") + _below(self, 0, "workers", "shuffle_buffer")
        problems += [
            f"{name}={getattr(self, name)} must lie in [0, 1]"
            for name in ("blank_caption_prob", "max_bad_fraction")
            if not 0 <= getattr(self, name) <= 1
        ]
        low, high = self.min_clip_score, self.max_clip_score
        if low is not None and high is not None and low > high:
            problems.append(f"min_clip_score={low} must not exceed max_clip_score={high}")
        if (self.filter_column is None) != (self.filter_value is None):
            problems.append(
                f"filter_column={self.filter_column} and filter_value={self.filter_value} need each other: set both"
            )
        _raise("data", problems)


@dataclass(frozen=True, kw_only=True)
class CropPhase:
    """A stretch of a codebook's training on pictures of one size."""

    steps: int
    batch_size: int
    crop: int
    """Side of the square that is cut out of each picture, around some edge; the picture's side takes it whole."""

    def __post_init__(self) -> None:
        _raise("phase", _below(self, 1, "steps", "batch_size", "crop"))


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
        problems = _below(self, 1, "restart_every", "log_every", "save_every")
        problems += _below(self, 0, "continuous_steps", "square_weight", "edge_weight", "minority_weight")
        if not self.phases:
            problems.append("phases is empty")
        if not 0 <= self.restart_until <= 1:
            problems.append(f"restart_until={self.restart_until} must lie in [0, 1]")
        _raise("vqgan_training", problems)


@dataclass(frozen=True, kw_only=True)
class ShapesDataConfig:
    """Captioned shapes (`data.synthetic`) as training data."""

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
        problems = _below(self, 1, "scenes")
        problems += [
            f"{name}={getattr(self, name)} must lie in [0, 1]"
            for name in ("single", "leave_out", "open_shapes", "blank")
            if not 0 <= getattr(self, name) <= 1
        ]
        _raise("data", problems)


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluationConfig:
    """How pictures are drawn that are checked against their captions while a model trains."""

    prompts: int = 32
    """Prompts of each kind, with pairs that were trained on and with pairs that were not."""
    seed: int = 12345
    condition_scale: float = 3.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        _raise("evaluation", _below(self, 1, "prompts") + _below(self, 0, "temperature"))


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
