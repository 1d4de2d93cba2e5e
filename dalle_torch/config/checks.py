"""What the sections of a configuration share: bounds, and one error that names all that is wrong."""

import math
from dataclasses import fields
from typing import Any


def refuse(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{owner} cannot be used: " + "; ".join(problems))


def not_finite(config: Any) -> list[str]:
    """NaN passes every comparison with a bound, and infinity those with a lower one: no option may be either."""
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    return [
        f"{name}={value} must be a finite number"
        for name, value in given.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]


def below(config: object, bound: float, *names: str) -> list[str]:
    return [
        f"{name}={getattr(config, name)} must be at least {bound:g}" for name in names if getattr(config, name) < bound
    ]


def not_above(config: object, bound: float, *names: str) -> list[str]:
    """None is no value, and fine."""
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return [f"{name}={value} must be above {bound:g}" for name, value in given.items() if value <= bound]


def seeds(config: object, *names: str) -> list[str]:
    """What torch takes."""
    return [
        f"{name}={getattr(config, name)} must lie in [0, 2^63)"
        for name in names
        if not 0 <= getattr(config, name) < 2**63
    ]
