"""XLA's text of a compiled program, read: computations, instructions, how often each runs.

Owns: the grammar as far as it is needed, loops' turns. Does not own: what is looked for (`collectives`, `work`).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Of an element; what is not here (tokens, semaphores) takes no memory that counts."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

RUNS = ("call", "conditional", "async-start", "call-start", "custom-call-start")
"""What runs other computations as they are; of asynchronous ones the start."""

_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+(?:b\d+)?(?:fn)?(?:uz)?)?)\[([0-9,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"\b(branch|called)_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """Type and shape of one array.

    Attributes:
        space: the memory it lies in: 0 is the device's, others are those of its cores (of vectors, of scalars, flags).
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.ceil(self.elements * _BYTES.get(self.dtype, self.dtype.startswith("f8")))

    @property
    def traffic(self) -> int:
        """Bytes that move to or from the device's memory when it is read or written."""
        return 0 if self.space else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        results: the arrays of its result, those of a tuple one after the other.
        operands: names.
        attributes: everything after the operands.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.results)

    @property
    def traffic(self) -> int:
        return sum(array.traffic for array in self.results)

    @cached_property
    def target(self) -> str:
        """Of a custom call: what is called."""
        found = _TARGET.search(self.attributes) if self.opcode == "custom-call" else None
        return found[1] if found else ""

    @cached_property
    def op_name(self) -> str:
        """Where it comes from, as whoever made the program named it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """(role, computation) of each that it runs."""
        listed = _LISTED.search(self.attributes)
        each = [(listed[1], name.strip().lstrip("%")) for name in listed[2].split(",") if name] if listed else []
        return (*_CALLED.findall(self.attributes), *each)


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [instruction for instruction in self.instructions.values() if instruction.opcode == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.operands[0]))

    def taken(self, instruction: Instruction) -> list[Instruction]:
        """What goes into one of its instructions."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def given(self, instruction: Instruction) -> tuple[Array, ...]:
        """What comes out of one of its instructions, or of the asynchronous one that it starts: a start's result names
        what goes in as well, before that or behind it, and flags."""
        results = instruction.results
        if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
            return results
        if instruction.opcode == "copy-start":
            return results[:1]
        before = sum(len(operand.results) for operand in self.taken(instruction))
        # Of a collective as many arrays come out as go in, of all others one.
        return results[before : 2 * before] if _CHANNEL.search(instruction.attributes) else results[before : before + 1]


@dataclass
class Program:
    """A module.

    Attributes:
        times: how often each computation runs, of those that are sequences of their own: loops' bodies, branches (each
            counts, though one alone is taken) and what is called. What is inside of a fusion is not among them.
        unknown_loops: loops whose turns XLA does not say; their bodies count once.
    """

    computations: dict[str, Computation]
    entry: str
    times: dict[str, int] = field(default_factory=dict)
    unknown_loops: int = 0

    @cached_property
    def continuations(self) -> frozenset[str]:
        """Computations inside of fusions that go on with a collective, or end it, which another one began.

        To let it run beside other work XLA writes one into several fusions, whole each time, on the same channel; they
        may be in loops that lie between its beginning and its end.
        """
        of_channel: dict[str, set[str]] = {}
        begun: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if channel := _CHANNEL.search(instruction.attributes):
                    of_channel.setdefault(channel[1], set()).add(computation.name)
                if instruction.target == "AsyncCollectiveStart":
                    begun.add(computation.name)
        return frozenset(name for names in of_channel.values() if names & begun for name in names if name not in begun)

    def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs by itself, and how often."""
        for name, times in self.times.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times


def parse(text: str) -> Program:
    """The program of XLA's long text.

    Raises:
        ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], Computation(head[2]))
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line.strip()):
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the compiler's text has no entry computation")
    program = Program(computations, entry)
    _count(program, entry, 1)
    return program


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    opcode = _OPCODE.search(f" {right}") if not right.startswith("(") else _OPCODE.search(right)
    if not equals or opcode is None:
        return None
    offset = 0 if right.startswith("(") else -1
    start, stop = opcode.start() + offset, opcode.end() + offset
    end = _closing(right, stop)
    operands = _NAMES.findall(right[stop:end])
    name = left.removeprefix("ROOT ").lstrip("%")
    if opcode[1] in ("parameter", "constant"):
        operands = [right[stop:end]]
    return Instruction(
        name, opcode[1], _arrays(right[: max(start, 0)]), tuple(operands), right[end + 1 :], left.startswith("ROOT ")
    )


def _arrays(text: str) -> tuple[Array, ...]:
    # Layouts, in braces, have brackets of their own.
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",")) if sizes else (), _space(layout))
        for dtype, sizes, layout in _SHAPE.findall(text)
    )


def _space(layout: str) -> int:
    found = _SPACE.search(layout)
    return int(found[1]) if found else 0


def _closing(text: str, start: int) -> int:
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _count(program: Program, name: str, times: int) -> None:
    program.times[name] = program.times.get(name, 0) + times
    for instruction in program.computations[name].instructions.values():
        if instruction.opcode == "while":
            turns = _turns(program, instruction)
            program.unknown_loops += turns is None
            for role, called in instruction.called:
                _count(program, called, times * (turns or 1) if role == "body" else times)
        elif instruction.opcode in RUNS:
            for _, called in instruction.called:
                _count(program, called, times)


def _turns(program: Program, loop: Instruction) -> int | None:
    """XLA's own number, or the bound of a counter, which loops of torch_xla count up to from zero.

    The counter is of 64 bits, which a TPU has as two words: the lower one is compared as an unsigned number.
    """
    if found := _TURNS.search(loop.attributes):
        return int(found[1])
    condition = program.computations[dict(loop.called)["condition"]].instructions
    bounds = [
        int(condition[second].operands[0])
        for first, second in (one.operands for one in condition.values() if one.opcode == "compare")
        if condition[second].opcode == "constant" and condition[first].results[0].dtype in ("u32", "u64")
    ]
    bounds = [bound for bound in bounds if bound]
    return bounds[0] if len(bounds) == 1 else None
