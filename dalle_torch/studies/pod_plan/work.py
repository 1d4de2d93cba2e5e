"""How much a compiled step computes, and how much it reads and writes in a device's memory.

Owns: counting both over all turns of loops, which XLA's own count takes for one. Does not own: the grammar (`hlo`).

Arithmetic is that of matrix products, in operations of bfloat16: one in float32 at full precision is made of six passes
of those. Memory is the sum, over everything that runs by itself, of what it reads and writes in the device's memory; of
a tensor that is only sliced or written in part, the part. What the compiler keeps in a core's own memory moves nothing.
"""

import math
import re
from dataclasses import dataclass

from dalle_torch.studies.pod_plan.hlo import COLLECTIVES, RUNS, Array, Computation, Instruction, Program

PASSES = {"highest": 6, "high": 3}
"""Products in bfloat16 that one of float32 is made of, by `operand_precision`."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", *RUNS,
}  # fmt: skip
"""What moves nothing by itself."""

_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveDone"}
"""The same of the compiler's own calls: places, names for them, promises, ends."""

_PARTS = ("dynamic-slice", "slice", "gather")
"""What reads of its first operand no more than it gives."""

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_PRECISION = re.compile(r"operand_precision=\{(\w+)")


@dataclass(frozen=True)
class Work:
    """Of one device in a step.

    Attributes:
        flops: operations of matrix products as they are written.
        passes: the same in operations of bfloat16, which a chip's published rate is of.
        bytes: read from and written to memory.
    """

    flops: float
    passes: float
    bytes: float


def count_work(program: Program) -> Work:
    """The work of a program."""
    flops = passes = moved = 0.0
    for computation, instruction, times in program.running():
        moved += times * _bytes(program, computation, instruction)
        for where, product in _products(program, computation, instruction):
            count = times * _flops(where, product)
            flops += count
            passes += count * _passes(where, product)
    return Work(flops, passes, moved)


def _products(
    program: Program, computation: Computation, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    if instruction.opcode in ("dot", "convolution") or _is_softmax(instruction):
        return [(computation, instruction)]
    if instruction.opcode not in ("fusion", "fusion-start"):
        return []
    found = []
    for role, name in instruction.called:
        if role == "calls":
            inside = program.computations[name]
            for inner in inside.instructions.values():
                found += _products(program, inside, inner)
    return found


def _is_softmax(instruction: Instruction) -> bool:
    """The kernel that XLA makes for newer chips of a softmax over keys and its product with values."""
    return instruction.opcode == "custom-call" and instruction.op_name == "online-softmax"


def _flops(computation: Computation, product: Instruction) -> float:
    out = product.results[0]
    operands = [computation.instructions[name].results[0] for name in product.operands[:2]]
    if product.opcode == "custom-call":
        return 2.0 * out.elements * operands[0].shape[-1]
    if product.opcode == "dot":
        found = _CONTRACTED.search(product.attributes)
        dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
        return 2.0 * out.elements * math.prod(operands[0].shape[dim] for dim in dims)
    return _convolution_flops(product, operands, out)


def _convolution_flops(product: Instruction, operands: list[Array], out: Array) -> float:
    """Multiplications of entries that are there: XLA writes batched products as windows that mostly see filling."""
    labels = _LABELS.search(product.attributes)
    assert labels is not None, product
    kernel = dict(zip(labels[2], operands[1].shape, strict=True))
    image = dict(zip(labels[1], operands[0].shape, strict=True))
    result = dict(zip(labels[3], out.shape, strict=True))
    total = 2.0 * result["b"] * result["f"] * kernel["i"]
    window = _window(product.attributes)
    for index, label in enumerate(sorted(key for key in kernel if key.isdigit())):
        settings = {name: values[index] for name, values in window.items()}
        total *= _hits(image[label], result[label], kernel[label], settings)
    return total


def _window(attributes: str) -> dict[str, list[str]]:
    found = _WINDOW.search(attributes)
    pairs = (part.split("=") for part in found[1].split()) if found else ()
    return {name: values.split("x") for name, values in pairs}


def _hits(image: int, result: int, kernel: int, settings: dict[str, str]) -> int:
    """Pairs of a place in the result and one in the kernel that meet an entry of the image."""
    stride, spread = int(settings.get("stride", 1)), int(settings.get("lhs_dilate", 1))
    step, before = int(settings.get("rhs_dilate", 1)), int(settings.get("pad", "0_0").split("_")[0])
    last = (image - 1) * spread
    count = 0
    for place in range(result):
        for offset in range(kernel):
            at = place * stride + offset * step - before
            count += 0 <= at <= last and at % spread == 0
    return count


def _passes(computation: Computation, product: Instruction) -> int:
    if any(computation.instructions[name].results[0].dtype != "f32" for name in product.operands[:2]):
        return 1
    found = _PRECISION.search(product.attributes)
    return PASSES.get(found[1], 1) if found else 1


def _bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target in _FREE_TARGETS:
        return 0
    operands, given = computation.taken(instruction), computation.given(instruction)
    reads = [operand.traffic for operand in operands]
    written = sum(array.traffic for array in given)
    if opcode == "fusion":
        inside = next(program.computations[name] for role, name in instruction.called if role == "calls")
        return _fusion_bytes(program, inside, given, reads)
    if opcode == "dynamic-update-slice":
        return reads[1] + (operands[1].bytes if written else 0)
    if opcode in _PARTS:
        return min(sum(array.bytes for array in given), reads[0]) + written
    return sum(reads) + written


def _fusion_bytes(program: Program, inside: Computation, results: tuple[Array, ...], reads: list[int]) -> float:
    read = sum(
        _read(program, inside, parameter.name, whole)
        for parameter, whole in zip(inside.parameters(), reads, strict=False)
    )
    root = inside.root
    if root.opcode == "tuple":
        names = root.operands
    elif root.target == "AsyncCollectiveStart":  # what is gathered comes second, after what it is made of
        names, results = root.operands[:1], results[1:2]
    else:
        names = (root.name,)
    # In which memory a result lies is told outside.
    return read + sum(
        _written(program, inside, inside.instructions[name])
        for name, array in zip(names, results, strict=False)
        if array.traffic
    )


def _read(program: Program, inside: Computation, name: str, whole: int) -> int:
    """Bytes that a fusion reads of an operand, `name` inside it: `whole`, unless it takes nothing but parts."""
    total = 0
    for use in inside.instructions.values():
        for index, operand in enumerate(use.operands):
            if operand == name and not _goes_on(program, inside, use):
                total += _part(program, use, index, whole)
    return min(whole, total)


def _part(program: Program, use: Instruction, index: int, whole: int) -> int:
    if use.opcode in _PARTS and index == 0:
        return use.bytes
    if use.opcode == "dynamic-update-slice" and index == 0:
        return 0
    if use.opcode == "tuple" or use.target == "AsyncCollectiveDone":  # it passes through
        return 0
    if use.opcode == "fusion":
        inside = next(program.computations[called] for role, called in use.called if role == "calls")
        return _read(program, inside, inside.parameters()[index].name, whole)
    return whole


def _written(program: Program, inside: Computation, result: Instruction) -> int:
    """Bytes that a fusion writes of a result."""
    while result.opcode == "bitcast":
        result = inside.instructions[result.operands[0]]
    if result.opcode == "parameter" or result.target in _FREE_TARGETS or _goes_on(program, inside, result):
        return 0
    if result.opcode == "dynamic-update-slice":
        return inside.instructions[result.operands[1]].bytes
    return result.bytes


def _goes_on(program: Program, inside: Computation, instruction: Instruction) -> bool:
    """Whether it is a collective that another fusion began, which counts there."""
    return inside.name in program.continuations and instruction.opcode.removesuffix("-start") in COLLECTIVES
