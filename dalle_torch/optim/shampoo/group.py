"""A parameter group whose `betas` also go by names of their own.

Owns: the one place where both betas are kept. Does not own: settings' bounds (`options`).
"""

from collections.abc import Mapping
from typing import Any

BETAS = ("beta1", "beta2")


class Group(dict[str, Any]):
    """Settings and parameters of a group; `group["beta1"]` and `group["beta2"]` are the two of `group["betas"]`.

    Schedulers of torch that cycle the momentum know only `betas`, as Adam has them.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        super().__init__({name: value for name, value in group.items() if name not in BETAS})
        for name in BETAS:
            if name in group:
                self[name] = group[name]

    def __missing__(self, name: str) -> Any:
        if name in BETAS:
            return self["betas"][BETAS.index(name)]
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in BETAS:
            betas = list(self["betas"])
            betas[BETAS.index(name)] = value
            name, value = "betas", tuple(betas)
        super().__setitem__(name, value)
