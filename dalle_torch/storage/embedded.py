"""What comes with the package, by name.

Owns: the names and where they lie. Does not own: reading what is there.
"""

from collections.abc import Mapping
from pathlib import Path

EMBEDDED: Mapping[str, Path] = {"shapes": Path(__file__).parents[1] / "assets" / "shapes"}
"""Models that come with the package, by name."""
