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


def _not_above(config: object, bound: float, *names: str) -> list[str]:
    """None is no value, and fine."""
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return [f"{name}={value} must be above {bound:g}" for name, value in given.items() if value <= bound]


@dataclass(frozen=True, kw_only=True)
class ShampooConfig:
    """What Shampoo has beside the options of all optimizers; `optim.DistributedShampoo` explains each."""

    block_size: int = 1024
    preconditioning_compute_steps: int = 10
    statistics_compute_steps: int = 1
    start_preconditioning_step: int | None = None
    matrix_epsilon: float = 1e-6
    inverse_failure_threshold: float = 0.1
    graft_type: Literal["sgd", "sqrt_n", "rmsprop", "rmsprop_normalized", "adagrad", "adagrad_normalized"] = (
        "rmsprop_normalized"
    )
    clip_by_scaled_gradient_norm: float | None = None
    exponent_override: int = 0
    best_effort_shape_interpretation: bool = True
    merge_small_dims_block_size: int = 4096
    skip_preconditioning_dim_size_gt: int = 4096
    nesterov: bool = False
    moving_average_for_momentum: bool = True
    best_effort_memory_usage_reduction: bool = False
    decoupled_learning_rate: bool = True
    decoupled_weight_decay: bool = False
    root_method: Literal["auto", "newton", "eigh"] = "auto"
    skip_nonfinite_gradients: bool = True
    compile: bool = False
    """Parameters that are not preconditioned are updated by compiled code: slow to start, then a third of the time."""

    def __post_init__(self) -> None:
        problems = _below(self, 1, "block_size", "preconditioning_compute_steps", "statistics_compute_steps")
        problems += _below(self, 1, "merge_small_dims_block_size")
        problems += _below(self, 0, "exponent_override", "skip_preconditioning_dim_size_gt")
        if self.start_preconditioning_step is not None:
            problems += _below(self, 0, "start_preconditioning_step")
        problems += _not_above(self, 0, "matrix_epsilon", "inverse_failure_threshold", "clip_by_scaled_gradient_norm")
        _raise("shampoo", problems)


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """What Adafactor (arXiv 1804.04235), as torch does it, has beside the options of all optimizers."""

    beta2_decay: float = -0.8
    """At update t, counted from 1, the moments take in a share t^beta2_decay of the new gradient's squares."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update, before the learning rate."""
    min_scale: float = 1e-3
    """Updates are relative to a parameter's root mean square, or to this where that is smaller."""

    def __post_init__(self) -> None:
        problems = _below(self, 1, "clip_threshold") + _below(self, 0, "min_scale")
        if self.beta2_decay > 0:
            problems.append(f"beta2_decay={self.beta2_decay} must be at most 0")
        _raise("adafactor", problems)


@dataclass(frozen=True, kw_only=True)
class ExponentialConfig:
    """A learning rate that is multiplied by `decay_rate` once in `transition_steps` updates."""

    decay_rate: float
    transition_steps: int
    staircase: bool = False
    """Multiply at the end of each `transition_steps`, not a little every update."""

    def __post_init__(self) -> None:
        problems = _below(self, 1, "transition_steps")
        if not 0 < self.decay_rate <= 1:
            problems.append(f"decay_rate={self.decay_rate} must lie in (0, 1]")
        _raise("exponential", problems)


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """A learning rate that is multiplied by `factor` when the evaluation's loss stalls."""

    factor: float = 0.5
    patience: int = 1
    """Evaluations in a row that may pass without a better loss; the next one lowers the rate."""
    threshold: float = 1e-3
    """Share by which a loss has to be below the best so far to be better."""

    def __post_init__(self) -> None:
        problems = _below(self, 0, "patience")
        problems += [] if 0 < self.factor < 1 else [f"factor={self.factor} must lie in (0, 1)"]
        problems += [] if 0 <= self.threshold < 1 else [f"threshold={self.threshold} must lie in [0, 1)"]
        _raise("plateau", problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer, its learning rate over time, and gradient clipping; what would have no effect is refused."""

    name: Literal["adamw", "adafactor", "shampoo"] = "adamw"
    """AdamW (arXiv 1711.05101), Adafactor (arXiv 1804.04235) or Distributed Shampoo (arXiv 2002.09018)."""
    lr: float = 1e-3
    """Highest learning rate, at the end of the warm-up. Adafactor's is relative to the size of each parameter."""
    offset_steps: int = 0
    """First updates, with a learning rate of zero: they fill the optimizer's moments."""
    warmup_steps: int = 100
    """Updates after those in which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine", "exponential", "plateau"] = "cosine"
    """What follows: linear and cosine reach `final_lr` at the last step, the next two have options of their own."""
    final_lr: float = 0.0
    """Lowest learning rate after the warm-up."""
    exponential: ExponentialConfig | None = None
    plateau: PlateauConfig | None = None
    """null: its defaults."""
    beta1: float | None = None
    """null: 0.9."""
    beta2: float | None = None
    """null: 0.98 for adamw, 0.999 for shampoo."""
    eps: float | None = None
    """Added to the root that is divided by. null: 1e-8 for adamw, 1e-10 for shampoo."""
    weight_decay: float = 0.0
    """On matrices and kernels alone; norms, biases and embeddings of positions are left free."""
    max_grad_norm: float | None = 1.0
    """Gradients whose norm is larger are scaled down to it; null: never."""
    adafactor: AdafactorConfig | None = None
    shampoo: ShampooConfig | None = None
    """null: their defaults."""

    def __post_init__(self) -> None:
        problems = _below(self, 0, "lr", "final_lr", "offset_steps", "warmup_steps", "weight_decay")
        if self.eps is not None:
            problems += _below(self, 0, "eps")
        problems += _not_above(self, 0, "max_grad_norm")
        problems += [*self._moments(), *self._without_effect()]
        if self.schedule == "exponential" and self.exponential is None:
            problems.append("schedule=exponential needs decay_rate and transition_steps: set exponential.*")
        _raise("optimizer", problems)

    def _moments(self) -> list[str]:
        problems = []
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            problems.append(f"beta1={self.beta1} must lie in [0, 1)")
        if self.beta2 is not None:
            if self.name == "shampoo" and not 0 < self.beta2 <= 1:
                problems.append(f"beta2={self.beta2} must lie in (0, 1]")
            if self.name != "shampoo" and not 0 <= self.beta2 < 1:
                problems.append(f"beta2={self.beta2} must lie in [0, 1)")
        return problems

    def _without_effect(self) -> list[str]:
        unused = {
            "name": [name for name in ("adafactor", "shampoo") if name != self.name],
            "schedule": [name for name in ("exponential", "plateau") if name != self.schedule],
        }
        if self.name == "adafactor":
            unused["name"] += ["beta1", "beta2", "eps"]
        problems = [
            f"{option} has no effect with {choice}={getattr(self, choice)}: leave it out"
            for choice, options in unused.items()
            for option in options
            if getattr(self, option) is not None
        ]
        if self.schedule == "constant" and self.final_lr:
            problems.append("final_lr has no effect with schedule=constant: leave it out")
        return problems


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
        if self.optimizer.schedule == "plateau":
            problems.append("optimizer.schedule=plateau needs evaluations, and there are none here: take another one")
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
