"""The optimizer's state by parameter name, and the checks of what comes in.

Owns: the form of a state dict, which states and settings fit, which parameters and gradients do. Does not own: tensors
(`bucket`).

A state dict is {"state": {name: {kind: tensor}}, "param_groups": [{setting: value, "params": [name]}]}, with the names
once more in "param_names"; a parameter that came without a name goes by its position, a number.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.bucket import Bucket
from dalle_torch.optim.shampoo.options import ADJUSTABLE, TAKEN_OVER, ShampooOptions
from dalle_torch.optim.shampoo.sharding import OneDevice

Groups = Sequence[Mapping[str, Any]]
Key = str | int

_PARAMETERS = {"params", "param_names"}


class ByName(dict[Any, Any]):
    """Part of a state dict, a dictionary as any, to which positions of parameters are told by their names.

    `torch.distributed.checkpoint.state_dict` takes it that a state dict goes by positions, and exchanges what they go
    by for the other: names would become positions. Copies and pickles are plain dictionaries.
    """

    def __init__(self, values: Mapping[Any, Any], names: Sequence[Key]) -> None:
        super().__init__(values)
        self._names = names

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == "params":
            value = [self._names[one] if isinstance(one, int) else one for one in value]
        super().__setitem__(self._names[key] if isinstance(key, int) else key, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # What `torch.load` reads with weights_only.
        return OrderedDict, (), None, None, iter(self.items())


def keys(groups: Groups) -> list[list[Key]]:
    """What the parameters of each group go by."""
    found, position = [], 0
    for group in groups:
        count = len(group["params"])
        found.append(list(group.get("param_names") or range(position, position + count)))
        position += count
    return found


def _names(groups: Groups) -> dict[int, Key]:
    """What the parameters go by, by their identity."""
    return {
        id(parameter): key
        for group, of_group in zip(groups, keys(groups), strict=True)
        for parameter, key in zip(group["params"], of_group, strict=True)
    }


def named_state(groups: Groups, buckets: Sequence[Sequence[Bucket]]) -> dict[str, Any]:
    """The state dict of an optimizer."""
    names = _names(groups)
    in_order = list(names.values())
    state = {
        names[id(parameter)]: bucket.state_of(index)
        for of_group in buckets
        for bucket in of_group
        for index, parameter in enumerate(bucket.parameters)
    }
    return {
        "state": ByName(state, in_order),
        "param_groups": [
            ByName({**group, "params": of_group}, in_order)
            for group, of_group in zip(groups, keys(groups), strict=True)
        ],
    }


@dataclass(frozen=True)
class StateStack:
    """A tensor of the state as it is kept: [N, ...], that of several parameters one after the other.

    Attributes:
        tensor: the state itself.
        kind: as the state dict names it.
        keys: what the parameters go by, in their order.
        rows: of each parameter; 0: one, which the state dict has without this dimension.
    """

    tensor: Tensor
    kind: str
    keys: list[Key]
    rows: int


def stacks_by_name(groups: Groups, buckets: Sequence[Bucket]) -> list[StateStack]:
    """All tensors of the state of `buckets`."""
    names = _names(groups)
    return [
        StateStack(tensor, kind, [names[id(parameter)] for parameter in bucket.parameters], rows)
        for bucket in buckets
        for kind, tensor, rows in bucket.tensors()
    ]


@dataclass(frozen=True)
class Saved:
    """What is there of a parameter.

    Attributes:
        state: tensors by kind.
        started: whether preconditioned updates were made.
    """

    state: dict[str, Tensor]
    started: bool


def checked(groups: Groups, state_dict: Mapping[str, Any]) -> list[dict[Tensor, Saved]]:
    """What is there of the parameters of each group; those that had made no update are not in it.

    Raises:
        ValueError: it does not fit the parameters or the settings; everything that does not is named.
    """
    saved_groups, states = _by_own_keys(groups, state_dict)
    own = keys(groups)
    names = [key for of_group in own for key in of_group]
    problems = [f"{key}: not in the saved state" for key in names if key not in saved_groups]
    problems += [f"{key}: in the saved state, not in this optimizer" for key in saved_groups if key not in set(names)]
    problems += [f"{key}: its state is saved, and no group has it" for key in states if key not in saved_groups]
    settings: dict[str, None] = {}
    found = []
    for group, of_group in zip(groups, own, strict=True):
        fitting = {}
        for key, parameter in zip(of_group, group["params"], strict=True):
            saved = saved_groups.get(key, group)
            settings |= dict.fromkeys(other_settings(group, saved))
            if key in states:
                problems += _other_tensors(key, parameter, states[key], ShampooOptions.of_group(group))
                start = saved.get("start_preconditioning_step", group["start_preconditioning_step"])
                fitting[parameter] = Saved(states[key], int(states[key].get("step", 0)) > start)
        found.append(fitting)
    # With other settings the shapes differ by necessity, and say nothing more.
    if settings or problems:
        raise ValueError("the saved state does not fit this optimizer: " + "; ".join([*settings] or problems))
    return found


def _by_own_keys(
    groups: Groups, state_dict: Mapping[str, Any]
) -> tuple[dict[Key, Mapping[str, Any]], dict[Key, dict[str, Tensor]]]:
    """Saved groups and states by what the parameters go by here.

    Where only one side has names, they are found by their order in groups of equal sizes.
    """
    if missing := [name for name in ("state", "param_groups") if name not in state_dict]:
        there = ", ".join(map(str, state_dict)) or "nothing"
        raise ValueError(f"the saved state has no {' and no '.join(missing)}, but {there}: give what state_dict() gave")
    saved_groups = state_dict["param_groups"]
    if any("params" not in group for group in saved_groups):
        raise ValueError("a group of the saved state does not say which params it is of: give what state_dict() gave")
    own, saved = keys(groups), [list(group["params"]) for group in saved_groups]
    same_sizes = [len(of_group) for of_group in own] == [len(of_group) for of_group in saved]
    renamed = {}
    if same_sizes and {_kind(saved), _kind(own)} == {int, str}:
        renamed = {a: b for pair in zip(saved, own, strict=True) for a, b in zip(*pair, strict=True)}
    return (
        {renamed.get(key, key): group for group in saved_groups for key in group["params"]},
        {
            renamed.get(key, key): {kind: torch.as_tensor(value) for kind, value in state.items()}
            for key, state in state_dict["state"].items()
        },
    )


def _kind(of_groups: Sequence[Sequence[Key]]) -> type | None:
    kinds = {type(key) for of_group in of_groups for key in of_group}
    return kinds.pop() if len(kinds) == 1 else None


def other_settings(group: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """What a group and a saved one disagree in and must not, one line each."""
    for field in fields(ShampooOptions):
        name = field.name
        if name not in ADJUSTABLE and saved.get(name) != group[name]:
            yield f"{name} is {saved.get(name)!r} in it and {group[name]!r} here"


def expected_tensors(parameter: Tensor, options: ShampooOptions) -> dict[str, Tensor]:
    """The tensors that make up the state of a parameter, without values."""
    # On the meta device state has shapes and costs nothing.
    stand_in = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return Bucket([stand_in], options, OneDevice()).state_of(0)


def _other_tensors(key: Key, parameter: Tensor, state: Mapping[str, Tensor], options: ShampooOptions) -> Iterator[str]:
    wanted = expected_tensors(parameter, options)
    for name in sorted({*wanted, *state}):
        here, there = wanted.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            yield f"{key}/{name}: shape {_shape(there, 'missing')} in it, {_shape(here, 'unknown')} here"
        elif not _converts_exactly(there.dtype, here.dtype):
            yield f"{key}/{name}: {there.dtype} in it, {here.dtype} here"


def _shape(tensor: Tensor | None, otherwise: str) -> list[int] | str:
    return otherwise if tensor is None else list(tensor.shape)


def _converts_exactly(source: torch.dtype, target: torch.dtype) -> bool:
    return source.is_floating_point == target.is_floating_point and torch.promote_types(source, target) == target


def take_over_settings(groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """What may change in a run and what schedulers left, of the groups that still hold the same parameters."""
    by_key, _ = _by_own_keys(groups, state_dict)
    fixed = {field.name for field in fields(ShampooOptions)} - TAKEN_OVER | _PARAMETERS
    for group, of_group in zip(groups, keys(groups), strict=True):
        saved = by_key[of_group[0]] if of_group else {}
        if {key for key, other in by_key.items() if other is saved} != set(of_group):
            continue
        for name, value in saved.items():
            if name not in fixed:
                group[name] = value.clone() if isinstance(value, Tensor) else value


def check_parameters(groups: Groups) -> None:
    """Raise ValueError, with all offenders, for parameters that are not real floating-point numbers or share a name."""
    problems, seen = [], set()
    for group, of_group in zip(groups, keys(groups), strict=True):
        for key, parameter in zip(of_group, group["params"], strict=True):
            if not parameter.is_floating_point():
                problems.append(f"{key} is {parameter.dtype}")
            if key in seen:
                problems.append(f"{key} comes twice")
            seen.add(key)
    if problems:
        raise ValueError("Shampoo takes real floating-point parameters of different names: " + "; ".join(problems))


def check_gradients(groups: Groups) -> None:
    """Raise ValueError, with all offenders, for gradients that are sparse or complex."""
    offenders = [
        (group_index, index)
        for group_index, group in enumerate(groups)
        for index, parameter in enumerate(group["params"])
        if parameter.grad is not None and (parameter.grad.layout is not torch.strided or parameter.grad.is_complex())
    ]
    if offenders:
        names = keys(groups)
        listed = ", ".join(
            f"{names[g][i]} ({groups[g]['params'][i].grad.layout}, {groups[g]['params'][i].grad.dtype})"
            for g, i in offenders
        )
        raise ValueError(f"Shampoo takes dense real gradients, not: {listed}; for embeddings, sparse=False")
