"""Prints the requirements of setup.cfg, one a line, that this environment does not meet.

Usage: missing.py [EXTRA,EXTRA...]
"""

import configparser
import importlib.metadata
import sys
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a new environment has pip and nothing else
    from pip._vendor.packaging.requirements import Requirement


def required(extras: list[str]) -> list[str]:
    config = configparser.ConfigParser(interpolation=None)
    config.read(Path(__file__).parent.parent / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"]]
    unknown = [extra for extra in extras if extra not in config["options.extras_require"]]
    if unknown:
        sys.exit(f"setup.cfg has no extra {', '.join(unknown)}")
    lists += [config["options.extras_require"][extra] for extra in extras]
    return [line.strip() for text in lists for line in text.splitlines() if line.strip()]


def met(line: str) -> bool:
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


if __name__ == "__main__":
    extras = [extra for extra in ",".join(sys.argv[1:]).split(",") if extra]
    print("\n".join(line for line in required(extras) if not met(line)))
