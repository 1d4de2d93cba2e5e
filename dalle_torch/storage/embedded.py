"""What comes with the package, by name.

Owns: the names and where they lie. Does not own: reading what is there.
"""

import os
from collections.abc import Mapping
from pathlib import Path

Source = str | os.PathLike[str]

EMBEDDED: Mapping[str, Path] = {"shapes": Path(__file__).parents[1] / "assets" / "shapes"}
"""Models that come with the package, by name."""


def located(source: Source) -> Source:
    """`source`, or the folder that an embedded model's name stands for.

    Raises:
        FileNotFoundError: this installation lacks the embedded model.
    """
    folder = EMBEDDED.get(str(source))
    if folder is None:
        return source
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded model {str(source)!r} is not in this installation ({folder}): install the package again, "
            "or name another model"
        )
    return folder


def located_vqgan(source: Source) -> Source:
    """`source`, or the folder of the VQGAN that comes with an embedded model of this name."""
    folder = located(source)
    return Path(folder) / "vqgan" if str(source) in EMBEDDED else source
