"""YAML files and `key=value` overrides to the dataclasses of `config`, unknown keys refused; and the way back.

Owns: reading and writing. Does not own: which options there are (`config`).
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from dalle_torch.storage.places import Place

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")

_OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes.*?"
    r" Errors: - (.*?) - Expected a <class '?NoneType.*?( Given value: .*)"
)
"""What the parser says of a wrong value where null would be right too: what is wrong with it, and the value."""


def load_config(cls: type[Config], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Build `cls` from a YAML or JSON file, with `overrides` such as "optimizer.lr=3e-4" laid over it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown keys, wrong types, values out of range, or an override without "=".
    """
    from jsonargparse import ArgumentParser

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there: name a YAML file such as configs/train/shapes.yaml")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(f"overrides need the form key=value, e.g. training.steps=100: {', '.join(wrong)}")
    unknown = _unknown_keys(cls, _tree(path))
    if unknown:
        raise ValueError(f"{path}: {'; '.join(unknown)}")
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--run_file", action="config")
    parser.add_class_arguments(cls, fail_untyped=True)
    try:
        found = parser.parse_args(["--run_file", os.fspath(path), *(f"--{override}" for override in overrides)])
        fields = vars(parser.instantiate(found))
        config: Config = cls(**{key: value for key, value in fields.items() if key != "run_file"})
    except Exception as error:
        # A whole section is no value that helps to find a mistake in it.
        reason = _OPTIONAL.sub(
            lambda match: match[1] + ("" if match[2].endswith(")") else match[2]), " ".join(str(error).split())
        )
        raise ValueError(f"{path}: {reason or type(error).__name__}") from error
    return config


def _tree(path: str | os.PathLike[str]) -> Any:
    """What the file says, for its names alone; None where it is no YAML, of which the parser tells."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return None


def _unknown_keys(kind: Any, tree: Any, prefix: str = "") -> list[str]:
    """What is wrong with the names in `tree`: the parser passes over unknown ones whose value is an empty section."""
    if isinstance(tree, list):
        return [problem for item in tree for inner in get_args(kind) for problem in _unknown_keys(inner, item, prefix)]
    if not isinstance(tree, Mapping):
        return []
    if not is_dataclass(kind):
        return [
            problem for inner in get_args(kind) if is_dataclass(inner) for problem in _unknown_keys(inner, tree, prefix)
        ]
    hints = get_type_hints(kind)
    problems = []
    for key, value in tree.items():
        if key in hints:
            problems += _unknown_keys(hints[key], value, f"{prefix}{key}.")
        else:
            near = difflib.get_close_matches(str(key), hints, n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(hints)}"
            problems.append(f"{prefix}{key} is no option; {known}")
    return problems


def dump_config(config: "DataclassInstance") -> str:
    """All options of `config`, defaults too, as YAML that `load_config` reads back to an equal one.

    The exceptions are its own: in `dict[str, Any]` it takes a string such as "10" for a number, and the string "null"
    for none where there may be none.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    # The reader takes 1e-3 for a number, as YAML 1.2 does: a string of that form needs quotes.
    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return yaml.dump(asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(config: "DataclassInstance", path: str | os.PathLike[str]) -> None:
    """Write `dump_config(config)` to a file, named by a path or a URL, whole or not at all. Raises OSError."""
    folder, _, name = os.fspath(path).rpartition("/")
    Place(folder or ".").write(name, dump_config(config).encode())
