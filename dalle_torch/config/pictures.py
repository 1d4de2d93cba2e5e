"""Pictures of fixed prompts that are drawn while a model trains: to look at, and to be scored."""

from dataclasses import dataclass, field

from dalle_torch.config.checks import below, not_finite, refuse, seeds


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """What sections that draw share: always the same prompts with the same seeds."""

    every: int | None = None
    """Updates between them; null: none are drawn, until it is set while the run goes."""
    prompts: list[str] = field(default_factory=list)
    images: int = 1
    """Of each prompt."""
    seed: int = 0
    condition_scale: float = 10.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def problems(self) -> list[str]:
        """All that makes the options unusable."""
        problems = below(self, 1, "images") + below(self, 0, "temperature") + seeds(self, "seed")
        if self.every is not None:
            problems += below(self, 1, "every")
            if not self.prompts:
                problems.append(f"every={self.every} without prompts: name some, or set every to null")
        if self.top_k is not None:
            problems += below(self, 1, "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie in (0, 1]")
        return not_finite(self) + problems


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(PicturesConfig):
    """Pictures that are drawn while a model trains, to look at."""

    def __post_init__(self) -> None:
        refuse("samples", self.problems())


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(PicturesConfig):
    """Pictures that are drawn while a model trains, scored and shown best first."""

    images: int = 4
    """Of each prompt; the mean of the best of them is logged beside the mean of all."""
    scorer: str | None = None
    """Who scores: a CLIP model (hub id, folder, artifact, URL), "open_clip:ARCHITECTURE:FILE", or "shapes", the judge
    of the embedded model, which reads captions of shapes alone."""
    features: str | None = None
    """By whose features `diversity`, the distance between pictures of one prompt, is measured: "inception", "shapes" or
    a file; null: it is not."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if self.prompts and not self.scorer:
            problems.append('prompts without scorer: name a CLIP model, or "shapes" for captions of shapes')
        if self.scorer is not None and not self.prompts:
            problems.append(f"scorer={self.scorer} without prompts: name some, or leave the scorer out")
        if any(not prompt.strip() for prompt in self.prompts):
            problems.append("prompts has an empty one, which no picture can be scored against: leave it out")
        twice = sorted({prompt for prompt in self.prompts if self.prompts.count(prompt) > 1})
        if twice:
            problems.append(f"prompts has {twice[0]!r} twice, whose pictures would be the same: leave one out")
        greedy = "temperature=0" if self.temperature == 0 else "top_k=1" if self.top_k == 1 else None
        if greedy and self.images > 1:
            problems.append(f"{greedy} draws the same picture images={self.images} times: set images=1, or another one")
        if self.features is not None:
            if not self.prompts:
                problems.append(f"features={self.features} without prompts: name some, or leave the features out")
            if self.images < 2:
                problems.append(f"features={self.features} compares pictures of a prompt: set images=2 or more")
        refuse("scores", problems)
