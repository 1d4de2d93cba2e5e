"""The state of any of the optimizers by parameter name, flat, as a safetensors file and a JSON file hold it.

Owns: which tensors there are and their shapes, which settings have to agree. Does not own: files, what is done about a
state that does not fit (`training`).

A tensor goes by `parameter/kind`. What is not a tensor is in a description: the optimizer's name, and of Shampoo the
settings that its matrices were made with.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.optimizer import DistributedShampoo
from dalle_torch.optim.shampoo.options import ShampooOptions
from dalle_torch.optim.shampoo.saving import expected_shapes as shampoo_shapes
from dalle_torch.optim.shampoo.saving import keys, other_settings

_FROM_CONFIG = ("lr", "weight_decay", "params")


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, contiguous; of parameters that had no update there are none."""
    return {
        f"{name}/{kind}": torch.as_tensor(value).contiguous()
        for name, state in _by_name(optimizer).items()
        for kind, value in state.items()
    }


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What has to agree for a state to be loaded, for JSON."""
    description: dict[str, Any] = {"name": type(optimizer).__name__}
    if isinstance(optimizer, DistributedShampoo):
        description["groups"] = [
            {setting: value for setting, value in group.items() if setting not in _FROM_CONFIG}
            | {"params": group["params"]}
            for group in optimizer.state_dict()["param_groups"]
        ]
    return description


def misfits(optimizer: torch.optim.Optimizer, description: Mapping[str, Any]) -> list[str]:
    """Why a state that was described so cannot be loaded, if it cannot; shapes are another matter."""
    own = type(optimizer).__name__
    if description["name"] != own:
        return [f"the optimizer is {description['name']} in it and {own} here"]
    if not isinstance(optimizer, DistributedShampoo):
        return []
    saved = {name: group for group in description["groups"] for name in group["params"]}
    found: dict[str, None] = {}
    for group, names in zip(optimizer.param_groups, keys(optimizer.param_groups), strict=True):
        for name in names:
            found |= dict.fromkeys(other_settings(group, saved[name]) if name in saved else ())
    return [f"optimizer {problem}" for problem in found]


def expected_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Name and shape of every tensor that the optimizer has after an update of all its parameters."""
    found: dict[str, torch.Size] = {}
    for group, names in zip(optimizer.param_groups, keys(optimizer.param_groups), strict=True):
        for name, parameter in zip(names, group["params"], strict=True):
            if isinstance(optimizer, DistributedShampoo):
                shapes = shampoo_shapes(parameter, ShampooOptions.of_group(group))
            elif isinstance(optimizer, torch.optim.Adafactor):
                shapes = _adafactor_shapes(parameter.shape)
            else:
                shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            found |= {f"{name}/{kind}": shape for kind, shape in shapes.items()}
    return found


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Take over a state that fits, on the devices of the parameters; learning rates and weight decay stay."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = tensor
    if isinstance(optimizer, DistributedShampoo):
        optimizer.load_state_dict({"state": by_name, "param_groups": description["groups"]})
        return
    # torch counts parameters through, and knows which state belongs on their device.
    names = [name for of_group in keys(optimizer.param_groups) for name in of_group]
    state = {index: by_name[str(name)] for index, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _by_name(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Tensor]]:
    if isinstance(optimizer, DistributedShampoo):
        return optimizer.state_dict()["state"]
    return {
        name: optimizer.state.get(parameter, {})
        for group, names in zip(optimizer.param_groups, keys(optimizer.param_groups), strict=True)
        for name, parameter in zip(names, group["params"], strict=True)
    }


def _adafactor_shapes(shape: torch.Size) -> dict[str, torch.Size]:
    if len(shape) < 2:
        return {"step": torch.Size(), "variance": shape}
    return {
        "step": torch.Size(),
        "row_var": torch.Size([*shape[:-1], 1]),
        "col_var": torch.Size([*shape[:-2], 1, shape[-1]]),
    }
