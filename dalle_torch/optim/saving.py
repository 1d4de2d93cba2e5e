"""The state of any of the optimizers by parameter name, flat, as a safetensors file and a JSON file hold it.

Owns: which tensors there are and their shapes, which settings have to agree. Does not own: files, what is done about a
state that does not fit (`training`).

A tensor goes by `parameter/kind`. What is not a tensor is in a description: the optimizer's name, and of Shampoo the
settings that its matrices were made with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dalle_torch.optim.shampoo.bucket import late_start
from dalle_torch.optim.shampoo.optimizer import DistributedShampoo
from dalle_torch.optim.shampoo.options import TAKEN_OVER, ShampooOptions
from dalle_torch.optim.shampoo.saving import StateStack, expected_tensors, keys, other_settings

_FROM_CONFIG = TAKEN_OVER | {"betas"}
"""Settings that are the run's, whatever they were when its state was saved."""
_UNSAVED = (_FROM_CONFIG - {"start_preconditioning_step"}) | {"params", "param_names"}


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
            {setting: value for setting, value in group.items() if setting not in _UNSAVED}
            | {"params": group["params"]}
            for group in optimizer.state_dict()["param_groups"]
        ]
    return description


def misfits(
    optimizer: torch.optim.Optimizer, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Why a state that was described so cannot be loaded, if it cannot; shapes are another matter.

    Args:
        tensors: the state, for what depends on how many updates were made.
    """
    own = type(optimizer).__name__
    if description["name"] != own:
        return [f"the optimizer is {description['name']} in it and {own} here"]
    if not isinstance(optimizer, DistributedShampoo):
        return []
    saved = {name: group for group in description["groups"] for name in group["params"]}
    found: dict[str, None] = {}
    for group, names in zip(optimizer.param_groups, keys(optimizer.param_groups), strict=True):
        for name in names:
            if name in saved:
                found |= dict.fromkeys(other_settings(group, saved[name]))
                found |= dict.fromkeys(_late_starts(name, ShampooOptions.of_group(group), saved[name], tensors or {}))
    return [f"optimizer {problem}" for problem in found]


def _late_starts(
    name: Any, options: ShampooOptions, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    updates = int(tensors.get(f"{name}/step", 0))
    preconditioned = f"{name}/diagonal_momentum" in tensors and updates > saved["start_preconditioning_step"]
    if preconditioned and (problem := late_start(updates, options)):
        yield f"has {problem}"


def expected_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Name and shape of every tensor that the optimizer has after an update of all its parameters."""
    found: dict[str, torch.Size] = {}
    for group, names in zip(optimizer.param_groups, keys(optimizer.param_groups), strict=True):
        for name, parameter in zip(names, group["params"], strict=True):
            if isinstance(optimizer, DistributedShampoo):
                tensors = expected_tensors(parameter, ShampooOptions.of_group(group))
                shapes = {kind: tensor.shape for kind, tensor in tensors.items()}
            elif isinstance(optimizer, torch.optim.Adafactor):
                shapes = _adafactor_shapes(parameter.shape)
            else:
                shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            found |= {f"{name}/{kind}": shape for kind, shape in shapes.items()}
    return found


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Take over a state that fits, on the devices of the parameters; what may change in a run of the settings stays."""
    by_name = _by_parameter(tensors)
    if isinstance(optimizer, DistributedShampoo):
        with _own_settings(optimizer):
            optimizer.load_state_dict({"state": by_name, "param_groups": description["groups"]})
        return
    # torch counts parameters through, and knows which state belongs on their device.
    names = [name for of_group in keys(optimizer.param_groups) for name in of_group]
    state = {index: by_name[str(name)] for index, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def open_state(
    optimizer: DistributedShampoo, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> list[StateStack]:
    """The same for a state that is read into place: its tensors as they are kept here, for the caller to fill.

    Args:
        tensors: without values, on the meta device, save for the counts of updates, `NAME/step`.
    """
    with _own_settings(optimizer):
        return optimizer.open_state({"state": _by_parameter(tensors), "param_groups": description["groups"]})


@contextmanager
def _own_settings(optimizer: DistributedShampoo) -> Iterator[None]:
    """What may change in a run is afterwards what it was before."""
    own = [{name: group[name] for name in _FROM_CONFIG if name in group} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = tensor
    return by_name


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
