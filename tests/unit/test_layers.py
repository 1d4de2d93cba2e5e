"""Imports point downwards only, and each optional dependency has its home.

The rules are the table below. Imports inside functions and for type checkers count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dalle_torch

PACKAGE = Path(dalle_torch.__file__).parent

LEVELS = {
    0: {"config", "config_io", "storage", "log", "products", "hashing"},
    1: {"text", "models", "optim", "parallel", "tracking", "shapes", "reports"},
    2: {"evaluation"},
    3: {"data", "checkpoint", "pipeline"},
    4: {"training"},
    5: {"studies"},
    6: {"cli", "app", "assets"},
}
LEVEL = {unit: level for level, units in LEVELS.items() for unit in units}

# The lazy public names and the registration with transformers reach into all levels, on first use.
FRONT_DOOR = {"__init__", "auto_classes"}

HOMES = {
    "torch_xla": ("parallel/",),
    "wandb": ("storage/", "tracking/"),
    "taming": ("models/vqgan.py",),
    "webdataset": ("data/token_shard.py",),
    "pyarrow": ("data/parquet.py",),
    "gradio": ("app/",),
    "fastapi": ("app/",),
    "uvicorn": ("app/",),
    "jax": ("studies/pod_plan/compiler.py",),
    "flax": (),
    "min_dalle": (),
}


class Import(NamedTuple):
    """One imported module, in the file `where`, relative to the package."""

    where: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.where}:{self.line} imports {self.module}"


def unit_of(path: str) -> str:
    """The folder or module right below the package."""
    return path.split("/")[0].split(".")[0]


def imports_of(source: str, where: str) -> Iterator[Import]:
    """Every module that `source` imports, relative imports and `import_module("...")` resolved."""
    here = ("dalle_torch/" + where).removesuffix(".py").split("/")
    package = here[:-1]
    for node in ast.walk(ast.parse(source, where)):
        if isinstance(node, ast.Import):
            yield from (Import(where, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from dalle_torch import storage` names a module, `from dalle_torch.log import progress` does not.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "dalle_torch" else [module]
            yield from (Import(where, node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(where, node.lineno, node.args[0].value)


def broken_rules(imports: Iterator[Import]) -> list[str]:
    """One line for each import that the tables forbid."""
    found = []
    for imported in imports:
        unit, (top, *rest) = unit_of(imported.where), imported.module.split(".")
        if top in HOMES and not any(imported.where.startswith(home) for home in HOMES[top]):
            found.append(f"{imported}: {top} is at home in {' and '.join(HOMES[top]) or 'no file'}")
        if top != "dalle_torch" or not rest or unit in FRONT_DOOR:
            continue
        other = unit_of(rest[0])
        if other in FRONT_DOOR or other.startswith("__") or other in dalle_torch.__all__:
            # The version is free to read; a class is imported from where it lives.
            if other in dalle_torch.__all__ and other != "__version__":
                found.append(f"{imported}: import it from its own module")
        elif other not in LEVEL or unit not in LEVEL:
            found.append(f"{imported}: {other if other not in LEVEL else unit} is in no level of the table")
        elif other != unit and LEVEL[other] >= LEVEL[unit] and LEVEL[unit] != 0:
            found.append(f"{imported}: level {LEVEL[unit]} may not reach into level {LEVEL[other]}")
        elif LEVEL[unit] == 0 and LEVEL[other] != 0:
            found.append(f"{imported}: level 0 may not reach into level {LEVEL[other]}")
    return found


def all_imports() -> Iterator[Import]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())


def test_every_import_of_the_package_points_downwards() -> None:
    broken = broken_rules(all_imports())
    assert not broken, "\n" + "\n".join(broken)


def test_the_front_door_imports_only_the_log_until_it_is_used() -> None:
    """At module level; the subprocess test of `test_import.py` sees the effect, this one names the line."""
    for name in sorted(FRONT_DOOR):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dalle_torch"):
                assert node.module in ("dalle_torch.log", "dalle_torch.auto_classes"), f"{name}.py:{node.lineno}"


def test_the_reader_sees_the_packages_own_imports() -> None:
    seen = {(imported.where, imported.module) for imported in all_imports()}
    assert ("storage/remote.py", "wandb") in seen
    assert ("storage/sources.py", "dalle_torch.storage.hub") in seen
    assert any(module.startswith("taming.") for where, module in seen if where == "models/vqgan.py")


@pytest.mark.parametrize(
    ("where", "source", "message"),
    [
        ("models/layers.py", "from dalle_torch.data import loader", "level 1 may not reach into level 3"),
        ("models/layers.py", "def f():\n    import dalle_torch.cli.main", "level 1 may not reach into level 6"),
        ("models/layers.py", "from ..pipeline.output import Output", "level 1 may not reach into level 3"),
        ("text/processor.py", "from dalle_torch.models import configuration", "level 1 may not reach into level 1"),
        ("log.py", "import dalle_torch.optim", "level 0 may not reach into level 1"),
        ("models/layers.py", "from dalle_torch import DalleBart", "import it from its own module"),
        ("models/layers.py", "from dalle_torch import pipeline", "level 1 may not reach into level 3"),
        ("models/layers.py", "import dalle_torch.odds", "odds is in no level of the table"),
        ("models/layers.py", "import torch_xla.core", "torch_xla is at home in parallel/"),
        ("models/layers.py", "import importlib\nimportlib.import_module('wandb')", "wandb is at home in storage/ and"),
        ("models/norms.py", "from taming.modules import x", "taming is at home in models/vqgan.py"),
        ("evaluation/compare.py", "import flax", "flax is at home in no file"),
    ],
)
def test_a_broken_rule_is_found(where: str, source: str, message: str) -> None:
    (broken,) = broken_rules(imports_of(source, where))
    assert message in broken


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("models/layers.py", "from dalle_torch.models.norms import Norm\nfrom . import attention\nfrom .. import log"),
        ("storage/hub.py", "from dalle_torch.log import get_logger\nimport huggingface_hub"),
        ("pipeline/pipeline.py", "from dalle_torch.pipeline.output import x\nfrom dalle_torch.text import y"),
        ("cli/main.py", "import dalle_torch.cli.generate\nfrom dalle_torch import __version__\nimport dalle_torch"),
        ("parallel/runtime.py", "import torch_xla"),
    ],
)
def test_what_is_allowed(where: str, source: str) -> None:
    assert broken_rules(imports_of(source, where)) == []
