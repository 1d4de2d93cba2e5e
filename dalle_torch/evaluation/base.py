"""What measures pictures.

Owns: the protocols of networks that judge, and how they are described in a result. Does not own: the networks (`clip`,
`features`, `shapes`), statistics over what they say (`distances`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

CHUNK = 32
"""Pictures or texts that a judging network takes at once, always: rounding depends on the size of a batch, and scores
are to depend neither on it nor on the memory of a machine."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Which network judged, for whoever compares two results.

    Attributes:
        name: short, such as "clip", "inception-v3" or "shapes".
        source: where its weights came from, as it was given.
        sha256: of the file or files of its weights; None where they came as an object.
        standard: whether published figures are made with this network. Where not, results say so.
        settings: what else decides the figures, such as the size pictures are brought to and how.
    """

    name: str
    source: str
    sha256: str | None
    standard: bool
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class TextImageScorer(Protocol):
    """How well a picture shows a text. More is better; what a figure means is the scorer's own matter."""

    @property
    def judge(self) -> Judge: ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The agreement of each picture with the prompt beside it; independent of what else is scored."""
        ...

    def similarities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """The agreement of every picture with every prompt, float32 [images, prompts], as `score` has it."""
        ...


class FeatureExtractor(Protocol):
    """Pictures to the numbers whose distribution is compared (FID, KID)."""

    @property
    def judge(self) -> Judge: ...

    @property
    def dimensions(self) -> int: ...

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [images, dimensions]; independent of what else is in the batch."""
        ...
