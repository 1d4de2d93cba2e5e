"""The optimizer's state by parameter name, and the checks of what comes in.

Owns: the form of a state dict, which states and settings fit, which parameters and gradients do. Does not own: tensors
(`bucket`).

A state dict is {"state": {name: {kind: tensor}}, "param_groups": [{setting: value, "params": [name]}]}; a parameter
that came without a name goes by its position, a number.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.bucket import Bucket
from dalle_torch.optim.shampoo.options import ADJUSTABLE, ShampooOptions
from dalle_torch.optim.shampoo.sharding import OneDevice

Groups = Sequence[Mapping[str, Any]]
Key = str | int


def keys(groups: Groups) -> list[list[Key]]:
    """What the parameters of each group go by."""
    found, position = [], 0
    for group in groups:
        count = len(group["params"])
        found.append(list(group.get("param_names") or range(position, position + count)))
        position += count
    return found


def named_state(groups: Groups, buckets: Sequence[Sequence[Bucket]]) -> dict[str, Any]:
    """The state dict of an optimizer."""
    names = {
        id(parameter): key
        for group, of_group in zip(groups, keys(groups), strict=True)
        for parameter, key in zip(group["params"], of_group, strict=True)
    }
    return {
        "state": {
            names[id(parameter)]: bucket.state_of(index)
            for of_group in buckets
            for bucket in of_group
            for index, parameter in enumerate(bucket.parameters)
        },
        "param_groups": [
            {setting: value for setting, value in group.items() if setting not in ("params", "param_names")}
            | {"params": of_group}
            for group, of_group in zip(groups, keys(groups), strict=True)
        ],
    }


def checked(groups: Groups, state_dict: Mapping[str, Any]) -> list[dict[Tensor, dict[str, Tensor]]]:
    """The states of the parameters of each group; those that had made no update are not in it.

    Raises:
        ValueError: they do not fit the parameters or the settings; everything that does not is named.
    """
    saved_groups = {key: group for group in state_dict["param_groups"] for key in group["params"]}
    states = state_dict["state"]
    own = keys(groups)
    names = [key for of_group in own for key in of_group]
    problems = [f"{key}: not in the saved state" for key in names if key not in saved_groups]
    problems += [f"{key}: in the saved state, not in this optimizer" for key in saved_groups if key not in set(names)]
    settings: dict[str, None] = {}
    found = []
    for group, of_group in zip(groups, own, strict=True):
        fitting = {}
        for key, parameter in zip(of_group, group["params"], strict=True):
            if key in saved_groups:
                settings |= dict.fromkeys(other_settings(group, saved_groups[key]))
            if key in states:
                problems += _other_shapes(key, parameter, states[key], ShampooOptions.of_group(group))
                fitting[parameter] = states[key]
        found.append(fitting)
    # With other settings the shapes differ by necessity, and say nothing more.
    if settings or problems:
        raise ValueError("the saved state does not fit this optimizer: " + "; ".join([*settings] or problems))
    return found


def other_settings(group: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """What a group and a saved one disagree in and must not, one line each."""
    for field in fields(ShampooOptions):
        name = field.name
        if name not in ADJUSTABLE and saved.get(name) != group[name]:
            yield f"{name} is {saved.get(name)!r} in it and {group[name]!r} here"


def expected_shapes(parameter: Tensor, options: ShampooOptions) -> dict[str, torch.Size]:
    """Kind and shape of the tensors that make up the state of a parameter."""
    # On the meta device state has shapes and costs nothing.
    stand_in = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return {name: tensor.shape for name, tensor in Bucket([stand_in], options, OneDevice()).state_of(0).items()}


def _other_shapes(key: Key, parameter: Tensor, state: Mapping[str, Tensor], options: ShampooOptions) -> list[str]:
    wanted = expected_shapes(parameter, options)
    found = {name: torch.as_tensor(value).shape for name, value in state.items()}
    return [
        f"{key}/{name}: shape {list(found[name]) if name in found else 'missing'} in it, "
        f"{list(wanted[name]) if name in wanted else 'unknown'} here"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]


def take_over_settings(groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Learning rate, weight decay and what schedulers left, of the groups that still hold the same parameters."""
    own = {field.name for field in fields(ShampooOptions)} - {"lr", "weight_decay"}
    saved_groups = {frozenset(group["params"]): group for group in state_dict["param_groups"]}
    for group, of_group in zip(groups, keys(groups), strict=True):
        saved = saved_groups.get(frozenset(of_group), {})
        for name, value in saved.items():
            if name not in own and name != "params":
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
