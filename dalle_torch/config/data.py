"""Shards of tokens as training data."""

from dataclasses import dataclass, field

from dalle_torch.config.checks import below, not_finite, refuse, seeds


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
        problems = below(self, 1, "lanes") + below(self, 0, "workers", "shuffle_buffer")
        problems += [
            f"{name}={getattr(self, name)} must lie in [0, 1]"
            for name in ("blank_caption_prob", "max_bad_fraction")
            if not 0 <= getattr(self, name) <= 1
        ]
        problems += seeds(self, "seed")
        problems += [
            f"evaluation.{name} is empty: name its shards" for name, urls in self.evaluation.items() if not urls
        ]
        low, high = self.min_clip_score, self.max_clip_score
        if low is not None and high is not None and low > high:
            problems.append(f"min_clip_score={low} must not exceed max_clip_score={high}")
        if (self.filter_column is None) != (self.filter_value is None):
            problems.append(
                f"filter_column={self.filter_column} and filter_value={self.filter_value} need each other: set both"
            )
        refuse("data", not_finite(self) + problems)
