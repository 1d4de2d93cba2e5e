"""What a tracker is.

Owns: the protocol, `Histogram`, the tracker that does nothing. Does not own: where things go (`json_lines`, `wandb`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Histogram:
    """How the entries of a tensor are spread, and their norm.

    Attributes:
        counts: entries in each bin.
        edges: of the bins, rising, one more than there are bins.
        norm: the Euclidean norm of all entries.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    norm: float

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} bins have {len(self.counts) + 1} edges, and not {len(self.edges)}")


class Tracker(Protocol):
    """Takes what a run has to tell; `step` is the number of updates done."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers by name, such as "loss" or "eval/coco/loss"."""
        ...

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None:
        """Histograms of tensors, by their names."""
        ...

    def images(self, name: str, images: Sequence["Image"], captions: Sequence[str], step: int) -> None:
        """Pictures that belong together, one caption each."""
        ...

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None:
        """Something that happened once: a changed setting, a save, a resume. `fields` can be written as JSON."""
        ...

    def finish(self, status: str) -> None:
        """Nothing follows. `status`: "finished" after the last step, "stopped" where the run can go on, or "failed"."""
        ...


class NullTracker:
    """Drops everything."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def histograms(self, values: Mapping[str, Histogram], step: int) -> None: ...

    def images(self, name: str, images: Sequence["Image"], captions: Sequence[str], step: int) -> None: ...

    def event(self, kind: str, fields: Mapping[str, Any], step: int) -> None: ...

    def finish(self, status: str) -> None: ...
