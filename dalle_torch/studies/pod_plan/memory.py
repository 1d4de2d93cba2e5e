"""What fills a device's memory, and what would make room.

Owns: bytes of a step's inputs by kind, the compiler's message where a step does not fit, settings that help. Does not
own: the compiler (`process`).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable

from dalle_torch.config import RunConfig
from dalle_torch.parallel.trace import TracedInput
from dalle_torch.studies.pod_plan.chips import GIB

_WIDTHS = {"bool": 1, "int8": 1, "bfloat16": 2, "float16": 2, "int64": 8, "float64": 8}
_TILES = re.compile(r"devices=\[([\d,]+)\]")
_USED = re.compile(r"Used (\S+) of (\S+) hbm|temporaries \((\S+)\) exceeds available HBM \((\S+)\)")
_SHAPE, _OPERATOR = re.compile(r"Shape: (\S+?)[{\s]"), re.compile(r'op_name="([^"]*)"')


def kind_of(name: str) -> str:
    """Of an input of a step: weights, a kind of the optimizer's state, batch, scalars."""
    for kind in ("batch", "scalar"):
        if name.startswith(f"{kind} "):
            return kind
    state, of, _ = name.partition(" of ")
    return state.split(".")[0].removesuffix("_scale") if of else "weights"


def bytes_of(entry: TracedInput) -> int:
    """Of one device, before the compiler lays it out in tiles."""
    shape = list(entry.shape)
    if found := _TILES.search(entry.sharding):
        parts = [int(count) for count in found[1].split(",")]
        shape = [-(-size // count) for size, count in zip(shape, parts, strict=False)]
    return math.prod(shape) * _WIDTHS.get(entry.dtype, 4)


def inputs_by_kind(inputs: Iterable[TracedInput]) -> dict[str, int]:
    """Bytes of a device of each kind, the largest first."""
    found: dict[str, int] = defaultdict(int)
    for entry in inputs:
        found[kind_of(entry.name)] += bytes_of(entry)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def read_message(message: str) -> tuple[str, str, list[str]]:
    """What the compiler needed, what there is, and the largest tensors, each with where it comes from."""
    used = _USED.search(message)
    largest = []
    entries = re.split(r"^\s*\d+\. Size: ", message, flags=re.MULTILINE)[1:]
    for entry in entries[:8]:
        shape, operator = _SHAPE.search(entry), _OPERATOR.search(entry)
        words = [entry.split()[0], shape[1] if shape else "", f"of {operator[1]}" if operator else ""]
        largest.append(" ".join(word for word in words if word))
    return (used[1] or used[3], used[2] or used[4], largest) if used else ("more than there is", "", largest)


def advice(config: RunConfig, inputs: Iterable[TracedInput]) -> list[str]:
    """Settings that need less memory than those of `config`, what costs least first."""
    training, found = config.training, []
    kinds = inputs_by_kind(inputs)
    if not training.gradient_checkpointing:
        found.append("training.gradient_checkpointing=true keeps of each layer its inputs alone")
    if not training.use_scan:
        found.append("training.use_scan=true has one layer's temporaries at a time")
    rows = training.batch_size // (config.mesh.dp or 1)
    if parts := next((parts for parts in range(2, rows + 1) if rows % parts == 0), None):
        found.append(
            f"training.batch_size={training.batch_size // parts} with training.accumulation_steps="
            f"{parts * training.accumulation_steps} has 1/{parts} of the activations in a pass, the update being the "
            f"same"
        )
    found.append(f"mesh.mp={2 * config.mesh.mp} halves weights and state of a device, where a host has as many devices")
    shampoo = config.optimizer.shampoo
    if config.optimizer.name == "shampoo" and not (shampoo and shampoo.best_effort_memory_usage_reduction):
        momenta = kinds.get("momentum", 0) + kinds.get("diagonal_momentum", 0)
        found.append(
            f"optimizer.shampoo.best_effort_memory_usage_reduction=true keeps momenta in 8 bits: "
            f"{momenta * 0.75 / GIB:.2f} GiB of a device"
        )
    if training.precision == "float32":
        found.append("training.precision=bfloat16 halves activations")
    return found
