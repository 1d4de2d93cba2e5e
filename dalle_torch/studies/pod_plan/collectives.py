"""What the devices of a compiled step tell each other: every collective, its kind, bytes, axis of the mesh, and layer.

Owns: reading them out of a program. Does not own: the program's grammar (`hlo`), how long they take (`roofline`).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dalle_torch.studies.pod_plan.hlo import COLLECTIVES, Array, Computation, Instruction, Program

_WORDS = {"xla__scan": "", "call": "", "while": "", "aot_forward": "forward", "aot_backward": "backward"}
"""What torch_xla's loops put into names, in ours."""

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]*)\))? ?\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


@dataclass(frozen=True)
class Collective:
    """Collectives of a program that are alike.

    Attributes:
        kind: one of `COLLECTIVES`.
        axis: of the mesh, along which devices talk: "dp", "mp", or both.
        group: devices that talk to each other.
        layer: where in the model or the step it comes from.
        shape: of what it moves, on one device: what is reduced, or what is gathered.
        bytes: of that, each time.
        times: in a step.
    """

    kind: str
    axis: str
    group: int
    layer: str
    shape: str
    bytes: int
    times: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends in a step, by the ring: twice (n - 1) / n of what is reduced, once of the rest."""
        share = (self.group - 1) / self.group if self.kind != "collective-permute" else 1.0
        return self.bytes * self.times * share * (2 if self.kind == "all-reduce" else 1)


def find_collectives(program: Program, place_of: Mapping[int, Sequence[int]], axes: Sequence[str]) -> list[Collective]:
    """Collectives in falling order of what they move; those that are alike together.

    Args:
        place_of: for each device its place along each axis of the mesh.
        axes: names.
    """
    alike: dict[Collective, int] = defaultdict(int)
    for computation, instruction, times in _instructions(program):
        kind = instruction.opcode.removesuffix("-start")
        group = _group(instruction, len(place_of))
        groups = _pairs(instruction) if kind == "collective-permute" else [group]
        moved = _moved(computation, instruction, kind)
        alike[
            Collective(
                kind=kind,
                axis=_axis([[place_of[device] for device in group] for group in groups], axes),
                group=len(group) if kind != "collective-permute" else 2,
                layer=layer_of(instruction.op_name),
                shape=", ".join(map(str, moved)),
                bytes=sum(array.bytes for array in moved),
                times=0,
            )
        ] += times
    found = [replace(collective, times=times) for collective, times in alike.items()]
    return sorted(
        found, key=lambda collective: (-collective.moved, collective.layer, collective.kind, collective.shape)
    )


def layer_of(op_name: str) -> str:
    """Where an operation comes from: modules and parts of a step that `parallel.trace` names, and the kind."""
    # An operation that was made of several has the names of all.
    parts = [re.sub(r"\.\d+$", "", part) for part in op_name.split(";")[0].split("/")]
    named = [_WORDS.get(part, part) for part in parts]
    return " ".join(dict.fromkeys(part for part in named if part)) or "added by the compiler"


def _instructions(program: Program) -> Iterator[tuple[Computation, Instruction, int]]:
    """Collectives that run by themselves, and those that the compiler fused with others: where each begins."""
    for computation, instruction, times in program.running():
        if _is_collective(instruction):
            yield computation, instruction, times
        elif instruction.opcode in ("fusion", "fusion-start"):
            for role, name in instruction.called:
                inside = program.computations[name]
                if role == "calls" and name not in program.continuations:
                    yield from ((inside, one, times) for one in inside.instructions.values() if _is_collective(one))


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _moved(computation: Computation, instruction: Instruction, kind: str) -> tuple[Array, ...]:
    """What is gathered is the result; of everything else it is what goes in."""
    if kind == "all-gather":
        return computation.given(instruction)
    return tuple(array for operand in computation.taken(instruction) for array in operand.results)


def _group(instruction: Instruction, devices: int) -> list[int]:
    """The first of the groups."""
    attributes = instruction.attributes
    if found := _IOTA.search(attributes):
        groups, sizes = (tuple(map(int, found[index].split(","))) for index in (1, 2))
        order = tuple(map(int, found[3].split(","))) if found[3] else tuple(range(len(sizes)))
        return _iota(sizes, order)[: groups[-1]]
    if found := _MESH.search(attributes):
        return _of_mesh(found[1], found[2], found[3])
    if found := _LISTED.search(attributes) or _PAIRS.search(attributes):
        return _listed(found[1])[0]
    return list(range(devices))


def _pairs(instruction: Instruction) -> list[list[int]]:
    """Of a permutation who sends to whom; some to themselves."""
    found = _PAIRS.search(instruction.attributes)
    return _listed(found[1]) if found else []


def _listed(text: str) -> list[list[int]]:
    """{0,4},{1,5} as lists."""
    groups = text.strip("{}").split("},{")
    return [[int(device) for device in group.split(",") if device] for group in groups]


def _of_mesh(axes: str, devices: str | None, along: str) -> list[int]:
    """The devices along some axes of a mesh, at the beginning of all others; of an axis it may be a part, as
    'axis':(2)4 is: after a factor of 2 the next 4."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    order = [int(device) for device in devices.split(",")] if devices else list(range(stride))
    places = [0]
    for name, _, before, size in _AXIS.findall(along):
        count = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * count) if size else 1)
        places = [place + step * index for place in places for index in range(count)]
    return [order[place] for place in places]


def _iota(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """0, 1, ... as an array of `sizes` with its axes in `order`, flat."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    flat = [0]
    for axis in order:
        flat = [number + step * strides[axis] for number in flat for step in range(sizes[axis])]
    return flat


def _axis(groups: Sequence[Sequence[Sequence[int]]], axes: Sequence[str]) -> str:
    """Along which the places of some group differ."""
    different = [
        name for index, name in enumerate(axes) if any(len({place[index] for place in places}) > 1 for places in groups)
    ]
    return " and ".join(different) or "none"
