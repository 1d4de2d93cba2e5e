"""A whole run of `dalle-torch train`, and those of its sections that no other command has."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dalle_torch.config.checks import below, not_finite, refuse
from dalle_torch.config.data import DataConfig
from dalle_torch.config.optimizer import OptimizerConfig
from dalle_torch.config.pictures import SamplesConfig, ScoresConfig
from dalle_torch.config.training import MeshConfig, TrainingConfig
from dalle_torch.storage.embedded import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained: made anew from a configuration, or fine-tuned from weights."""

    config: str | None = None
    """For a new model: its `config.json`, or a folder, hub id or URL that has one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keys of `DalleBartConfig` that are laid over it."""
    weights: str | None = None
    """For fine-tuning: hub id, folder, artifact or URL of a model."""
    revision: str | None = None
    """Branch, tag or commit of `config` or `weights` on the hub."""
    trust_pickle: bool = False
    """Read `weights` from files that can run any code."""
    tokenizer: str | None = None
    """Source of the tokenizer; null: `weights` or `config`."""
    vqgan: str | None = None
    """Of the codes in the data; needed for sample pictures, and written to the model's card. null: the one that comes
    with `weights` where that is an embedded model whose embeddings stay, else none."""
    codebook_size: int | None = None
    """Codes of the VQGAN, above which a label is refused; null: as many as the model has image tokens."""
    train: list[str] = field(default_factory=lambda: ["all"])
    """What is trained: "all", "embeddings" (of tokens and positions, and `lm_head`), or patterns of parameters' names
    such as "decoder.layers.*.cross_attn.*"."""
    reinitialize_embeddings: bool = False
    """Draw those embeddings anew, for another tokenizer or VQGAN."""

    def __post_init__(self) -> None:
        if self.vqgan is None and self.weights in EMBEDDED and not self.reinitialize_embeddings:
            object.__setattr__(self, "vqgan", self.weights)
        problems = []
        if (self.config is None) == (self.weights is None):
            problems.append(
                f"config={self.config!r} and weights={self.weights!r}: set one, config for a new model and weights to "
                f"fine-tune"
            )
        if self.weights is not None and self.options:
            problems.append("options are for a new model; one that is fine-tuned brings its own: leave them out")
        if self.reinitialize_embeddings and self.weights is None:
            problems.append("reinitialize_embeddings=true has no effect on a new model: leave it out")
        if not self.train:
            problems.append('train is empty: name what is trained, as ["all"]')
        if self.codebook_size is not None:
            problems += below(self, 1, "codebook_size")
        refuse("model", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What a run computes on."""

    backend: Literal["accelerate", "xla"] = "accelerate"
    """accelerate: CPU and GPUs, one process a device; xla: TPUs, one process a host and a mesh over all of them. The
    section `mesh` is for xla alone, and `device` and `parallel` for accelerate, so that one key switches."""
    device: str = "auto"
    """Of accelerate: auto, cpu, cuda or mps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of accelerate with several processes: whole copies (DistributedDataParallel), or parameters, gradients and
    optimizer state spread over the processes (FSDP2)."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        problems = []
        if self.timeout_minutes <= 0:
            problems.append(f"timeout_minutes={self.timeout_minutes} must be above 0")
        refuse("runtime", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run's checkpoints go, and which of them stay."""

    folder: str | None = None
    """A folder or URL, such as gs://bucket/run, that all hosts can reach; null: `checkpoints` in the run's folder."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple of it stay too."""
    asynchronous: bool = False
    """Write while the training goes on; costs a copy of all state in the host's memory."""

    def __post_init__(self) -> None:
        problems = below(self, 1, "keep")
        if self.keep_every is not None:
            problems += below(self, 1, "keep_every")
        refuse("checkpoint", not_finite(self) + problems)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go beside `metrics.jsonl` in the run's folder, which always gets them."""

    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "dalle-torch"
    entity: str | None = None
    name: str | None = None
    """Of the run; null: wandb finds one."""
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse("tracking", not_finite(self) + ([] if self.project else ["project is empty"]))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run: what `dalle-torch train --config FILE` reads."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)

    def __post_init__(self) -> None:
        problems = []
        if not self.data.train:
            problems.append("data.train is empty: name the shards to train on")
        if self.optimizer.schedule == "plateau" and not self.data.evaluation:
            problems.append("optimizer.schedule=plateau goes by an evaluation's loss: set data.evaluation")
        for name, section in (("samples", self.samples), ("scores", self.scores)):
            if self.model.vqgan is None and (section.every is not None or section.prompts):
                given = f"{name}.prompts" if section.every is None else f"{name}.every={section.every}"
                problems.append(
                    f"{given} needs the VQGAN to draw with: set model.vqgan to that of the codes in the data, or leave "
                    f"{name} out"
                )
        if self.runtime.parallel == "fsdp" and self.optimizer.name == "shampoo":
            problems.append(
                "optimizer.name=shampoo needs whole parameters, which runtime.parallel=fsdp has not: take ddp, or adamw"
            )
        refuse("run", not_finite(self) + problems)
