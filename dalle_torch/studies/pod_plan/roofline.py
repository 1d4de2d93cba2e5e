"""How long a step cannot but take: an estimate from the published rates of a chip.

Owns: the arithmetic. Does not own: the rates (`chips`), what a step does (`work`, `collectives`).

Three times are taken as if nothing else went on: of matrix products at the peak, of memory, and of links, all of a
chip's at once. If a device did all three side by side the step would take the longest of them, and their sum if it did
one after the other; a real step lies between or above, since no rate is ever reached and waiting is not in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dalle_torch.studies.pod_plan.chips import Chip
from dalle_torch.studies.pod_plan.collectives import Collective
from dalle_torch.studies.pod_plan.work import Work


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        arithmetic, memory, links: of each alone.
    """

    arithmetic: float
    memory: float
    links: float

    @property
    def least(self) -> float:
        """Everything side by side."""
        return max(self.arithmetic, self.memory, self.links)

    @property
    def most(self) -> float:
        """One after the other, at the published rates."""
        return self.arithmetic + self.memory + self.links

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))


def estimate(work: Work, collectives: Iterable[Collective], chip: Chip) -> Estimate:
    """The estimate of one step."""
    return Estimate(
        arithmetic=work.passes / chip.core_flops,
        memory=work.bytes / chip.core_memory_rate,
        links=sum(collective.moved for collective in collectives) / chip.core_link_rate,
    )


def mean(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Of steps of several kinds, of which each makes up a share."""

    def of(name: str) -> float:
        return sum(weight * getattr(one, name) for one, weight in zip(estimates, weights, strict=True))

    return Estimate(of("arithmetic"), of("memory"), of("links"))
