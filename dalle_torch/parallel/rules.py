"""How every parameter of a DalleBart lies on the mesh: a table of patterns and specs.

Owns: the table, and the refusal of models that it does not describe. Does not own: the mesh (`mesh`), putting tensors
on it (`spmd`). Nothing here needs an accelerator or its library.

The layout is the original's (borisdayma/dalle-mini, `model/partitions.py`), whose kernels are [in, out] where torch's
are [out, in]: what is split over mp is
- embeddings of tokens and of positions, by rows; `lm_head`, by rows, which are the vocabulary too;
- the projections that an attention or feed-forward part begins with, by outputs, and the one that it ends with, by
  inputs: between the two no device needs what another one computes, but for a norm's statistics;
- Swin's position tables, by columns, which are (key, head).
Norms, biases and head scales are whole everywhere.

Sizes. The original's partitioner took only sizes that mp divides, so a model that was to be split had to be made of
such: Mega's 50272 rows of text tokens, 16415 + 1 of image tokens and 4096 inner features are multiples of 8. Mini's
16384 + 1 and 2730 are not. Here such a size is refused too, unless `mesh.uneven` is "pad": XLA then gives every device
ceil(size / mp) rows, the last one fewer, and fills that one up to the same. Values do not change: the filling is
seen neither in a tensor's shape nor in sums.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Spec = tuple[str | None, ...]
"""For each dimension of a tensor the axis of the mesh that it is split over, or None."""

Uneven = Literal["refuse", "pad"]


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name `pattern` matches lie as `spec` says."""

    pattern: str
    spec: Spec


class LayoutOptions(Protocol):
    """The options of a model that decide which parameters it has; `DalleBartConfig` has them all."""

    @property
    def use_bias(self) -> bool: ...
    @property
    def use_glu(self) -> bool: ...
    @property
    def use_head_scale(self) -> bool: ...
    @property
    def use_absolute_position_embeddings(self) -> bool: ...
    @property
    def use_swin_position_embeddings(self) -> bool: ...


BY_ROWS: Spec = ("mp", None)
BY_COLUMNS: Spec = (None, "mp")
WHOLE: Spec = (None,)

_STACK = r"(encoder|decoder)\."
_LAYER = _STACK + r"layers\.\d+\."
_ATTENTION = _LAYER + r"(self|cross)_attn\."
_FEED_FORWARD = _LAYER + r"feed_forward\."


def layout_rules(options: LayoutOptions) -> tuple[Rule, ...]:
    """The table for a model with these options, and no rule more: each one has something to match."""
    table: list[tuple[bool, str, Spec]] = [
        (True, _STACK + r"embed_tokens\.weight", BY_ROWS),
        (options.use_absolute_position_embeddings, _STACK + r"embed_positions\.weight", BY_ROWS),
        (True, r"lm_head\.weight", BY_ROWS),
        (True, _ATTENTION + r"[qkv]_proj\.weight", BY_ROWS),
        (True, _ATTENTION + r"out_proj\.weight", BY_COLUMNS),
        (options.use_bias, _ATTENTION + r"(q|k|v|out)_proj\.bias", WHOLE),
        (options.use_swin_position_embeddings, _ATTENTION + r"position_bias\.weight", BY_COLUMNS),
        (options.use_head_scale, _ATTENTION + r"head_scale", WHOLE),
        (options.use_glu, _FEED_FORWARD + r"gate_proj\.weight", BY_ROWS),
        (True, _FEED_FORWARD + r"up_proj\.weight", BY_ROWS),
        (True, _FEED_FORWARD + r"down_proj\.weight", BY_COLUMNS),
        (options.use_bias, _FEED_FORWARD + r"(gate|up|down)_proj\.bias", WHOLE),
        # Which norms have a scale or a bias hangs on five options together; the one after the embeddings is in each.
        (True, _STACK + r"(.+\.)?(\w+_norm|layernorm_embedding)\.(weight|bias)", WHOLE),
    ]
    return tuple(Rule(pattern, spec) for there, pattern, spec in table if there)


def lay_out(
    shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule], sizes: Mapping[str, int], uneven: Uneven = "refuse"
) -> dict[str, Spec]:
    """The spec of every parameter: that of the first rule that matches its name.

    Args:
        shapes: of the parameters, by name.
        rules: the table, `layout_rules` for a DalleBart.
        sizes: of the mesh's axes, `MeshPlan.sizes`.
        uneven: what becomes of a dimension that its axis does not divide; see the module's docstring.

    Raises:
        ValueError: a parameter matches no rule, a rule is no parameter's first, or a shape does not suit the spec; one
            error names all of them.
    """
    chosen = _first_matches(shapes, rules)
    unmatched = [name for name in shapes if name not in chosen]
    unused = [rule.pattern for index, rule in enumerate(rules) if index not in chosen.values()]
    specs = {name: rules[index].spec for name, index in chosen.items()}
    problems = [
        *_listing("parameters without a rule (add one to the table)", unmatched),
        *_listing("rules that are no parameter's first match (remove them, or move them up)", unused),
        *_listing("rules of another rank than their parameters", _other_ranks(shapes, specs)),
        *_listing(_UNEVEN_ADVICE[uneven], _uneven(shapes, specs, sizes, uneven)),
    ]
    if problems:
        raise ValueError("the model cannot be laid out on the mesh: " + "; ".join(problems))
    return specs


def spec_of_state(shape: Sequence[int], parameter_shape: Sequence[int], spec: Spec) -> Spec:
    """How a tensor of an optimizer's state lies, whose parameter of `parameter_shape` lies by `spec`: the dimensions
    that are the parameter's as there, all others (a mean over rows or columns, a count) whole."""
    if len(shape) != len(parameter_shape):
        return (None,) * len(shape)
    return tuple(axis if size == own else None for size, own, axis in zip(shape, parameter_shape, spec, strict=True))


_UNEVEN_ADVICE: dict[Uneven, str] = {
    "refuse": "sizes that mp does not divide (change the size, set mesh.mp to a divisor of it, or mesh.uneven to pad)",
    "pad": "sizes that leave a device empty even with mesh.uneven=pad (change the size, or lower mesh.mp)",
}


def _first_matches(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, int]:
    """For each name that any rule matches the index of the first that does."""
    patterns = [re.compile(rule.pattern) for rule in rules]
    matches = {
        name: next((index for index, pattern in enumerate(patterns) if pattern.fullmatch(name)), None) for name in names
    }
    return {name: index for name, index in matches.items() if index is not None}


def _listing(what: str, offenders: Sequence[str]) -> list[str]:
    return [f"{what}: {', '.join(offenders)}"] if offenders else []


def _other_ranks(shapes: Mapping[str, Sequence[int]], specs: Mapping[str, Spec]) -> list[str]:
    return [
        f"{name} has {len(shapes[name])} dimensions for the {len(spec)} of {spec}"
        for name, spec in specs.items()
        if len(shapes[name]) != len(spec)
    ]


def _uneven(
    shapes: Mapping[str, Sequence[int]], specs: Mapping[str, Spec], sizes: Mapping[str, int], uneven: Uneven
) -> list[str]:
    """Dimensions that do not split as `uneven` allows, layers that are alike named once."""
    found = [
        f"{_without_number(name)} dimension {dimension} of {size} over {axis}={sizes[axis]}"
        for name, spec in specs.items()
        for dimension, (size, axis) in enumerate(zip(shapes[name], spec, strict=False))
        if axis is not None and not _splits(size, sizes[axis], uneven)
    ]
    return list(dict.fromkeys(found))


def _splits(size: int, parts: int, uneven: Uneven) -> bool:
    if uneven == "refuse":
        return size % parts == 0
    # All but the last are full, so the last is empty if the others hold everything.
    return -(-size // parts) * (parts - 1) < size


def _without_number(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
