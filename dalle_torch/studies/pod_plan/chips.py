"""TPU chips, their published rates, and the names under which slices of them are rented.

Owns: the table and the names. Does not own: what libtpu knows of a topology (`compiler`), estimates (`roofline`).

Sources, all per chip: Google Cloud's pages "TPU v2" to "TPU v6e" (cloud.google.com/tpu/docs) for arithmetic, memory
and, from v4 on, links between chips (of v4 the all-reduce bandwidth of a pod over its 4096 chips; of v5p half of what
goes both ways); for links of v2 and v3 Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural
Networks",
CACM 2020: four of 496 and of 656 Gbit/s each way.
"""

import math
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        name: as in names of slices.
        tflops: bfloat16, 10^12 operations a second, of a chip.
        memory: bytes of a chip.
        memory_rate: bytes a second between a chip and its memory.
        link_rate: bytes a second that a chip sends over all of its links together.
        cores: devices of a chip.
        counted: what the number in a slice's name counts for each chip.
        dimensions: of a slice.
        largest: chips of a pod.
    """

    name: str
    tflops: float
    memory: int
    memory_rate: float
    link_rate: float
    cores: int
    counted: int
    dimensions: int
    largest: int

    @property
    def core_flops(self) -> float:
        """Operations a second of one device."""
        return self.tflops * 1e12 / self.cores

    @property
    def core_memory(self) -> int:
        """Bytes of one device."""
        return self.memory // self.cores

    @property
    def core_memory_rate(self) -> float:
        return self.memory_rate / self.cores

    @property
    def core_link_rate(self) -> float:
        return self.link_rate / self.cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", 46, 16 * GIB, 700e9, 248e9, 2, 2, 2, 256),
        Chip("v3", 123, 32 * GIB, 900e9, 328e9, 2, 2, 2, 1024),
        # libtpu describes a v4 chip's cores as devices of their own.
        Chip("v4", 275, 32 * GIB, 1200e9, 268e9, 2, 2, 3, 4096),
        Chip("v5e", 197, 16 * GIB, 819e9, 200e9, 1, 1, 2, 256),
        Chip("v5p", 459, 95 * GIB, 2765e9, 600e9, 1, 2, 3, 6144),
        Chip("v6e", 918, 32 * GIB, 1600e9, 400e9, 1, 1, 2, 256),
    )
}
_OTHER_NAMES = {"v5litepod": "v5e"}


@dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Attributes:
        name: as it is rented, "v3-256".
        chips: along each dimension.
    """

    name: str
    chip: Chip
    chips: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.chips) * self.chip.cores

    @property
    def of_libtpu(self) -> str:
        """libtpu's name for it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.chips))}"


def find_topology(name: str) -> Topology:
    """The slice of a name: "v3-256", or with its shape in chips, "v3:8x16".

    Raises:
        ValueError: there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", name)
    chip = CHIPS.get(_OTHER_NAMES.get(match[1], match[1])) if match else None
    if match is None or chip is None:
        raise ValueError(
            f"topology {name!r} is unknown: give a kind and a size, as v3-256 or v3:8x16, of {', '.join(CHIPS)}"
        )
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        if len(shape) != chip.dimensions or 0 in shape:
            raise ValueError(f"topology {name!r}: a slice of {chip.name} has {chip.dimensions} dimensions of chips")
    else:
        shape = _shape(name, chip, int(match[2]))
    if math.prod(shape) > chip.largest:
        raise ValueError(f"topology {name!r} has {math.prod(shape)} chips, and a pod of {chip.name} {chip.largest}")
    return Topology(name, chip, shape)


def _shape(name: str, chip: Chip, size: int) -> tuple[int, ...]:
    """The chips of a slice as near to a square or a cube as powers of two come, the last dimension the longest."""
    chips, rest = divmod(size, chip.counted)
    if rest or chips < 1 or chips & (chips - 1):
        unit = "cores" if chip.counted == 2 else "chips"
        raise ValueError(
            f"topology {name!r}: slices of {chip.name} are named by {unit}, {chip.counted} times a power of two; for "
            f"others give the shape in chips, as {chip.name}:{'x'.join(['4'] * chip.dimensions)}"
        )
    exponent = chips.bit_length() - 1
    if chip.dimensions == 3 and exponent == 2:
        return (2, 2, 1)
    low, more = divmod(exponent, chip.dimensions)
    return tuple(2 ** (low + (index >= chip.dimensions - more)) for index in range(chip.dimensions))
