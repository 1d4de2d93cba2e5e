"""Variants of a configuration, each of which is planned.

Owns: what `--sweep` says, and the options that it stands for. Does not own: plans (`plan`).
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from dalle_torch.config import RunConfig


def variants(config: RunConfig, axes: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(what it is called, options over the configuration) of each combination of the values of all axes.

    Args:
        axes: "mesh=8x32,16x16" (dp x mp), "accumulation=1,3,6" (passes of an update of as many samples as the
            configuration's), or any option, as "training.use_scan=true,false".

    Raises:
        ValueError: an axis has no values, or they are not of its kind; the samples of an update do not divide.
    """
    parsed = []
    for axis in axes:
        name, equals, values = axis.partition("=")
        if not name or not equals or not all(values.split(",")):
            raise ValueError(f"--sweep {axis!r}: give a name and values, as mesh=32x8,16x16 or accumulation=1,3")
        parsed.append([(f"{name}={value}", _options(config, name, value)) for value in values.split(",")])
    for combination in itertools.product(*parsed):
        yield ", ".join(name for name, _ in combination), [option for _, options in combination for option in options]


def _options(config: RunConfig, name: str, value: str) -> list[str]:
    if name == "mesh":
        match = re.fullmatch(r"(\d+)x(\d+)", value)
        if not match:
            raise ValueError(f"--sweep mesh={value}: a mesh is dp x mp, as 32x8")
        return [f"mesh.dp={match[1]}", f"mesh.mp={match[2]}"]
    if name == "accumulation":
        samples = config.training.batch_size * config.training.accumulation_steps
        if not value.isdecimal() or not int(value) or samples % int(value):
            raise ValueError(
                f"--sweep accumulation={value}: an update's {samples} samples are to be passed in equal parts: give a "
                f"divisor"
            )
        return [f"training.accumulation_steps={value}", f"training.batch_size={samples // int(value)}"]
    return [f"{name}={value}"]
