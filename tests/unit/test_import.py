"""What importing the package costs, the names it offers, and that transformers' auto classes learn of it."""

import importlib
import inspect
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import dalle_torch
from tests.helpers import GOLDENS

ROOT = Path(dalle_torch.__file__).parent.parent
HEAVY = ("torch", "torch_xla", "transformers", "tokenizers", "numpy", "PIL", "huggingface_hub", "fsspec", "wandb",
         "taming", "pytorch_lightning", "accelerate", "gradio", "einops", "tqdm", "ftfy", "msgpack")  # fmt: skip


def run_python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dalle_torch; dir(dalle_torch); dalle_torch.__version__; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert "dalle_torch" in loaded
    assert not loaded.intersection(HEAVY)


def test_storage_imports_its_libraries_only_when_they_are_used() -> None:
    code = (
        "import sys; from dalle_torch.storage import resolve, atomic_file; resolve('tests', subfolder='goldens');"
        "print(*sys.modules)"
    )
    assert not {name.split(".")[0] for name in run_python(code).split()}.intersection(HEAVY)


def test_the_optimizers_import_torch_only_when_they_are_used() -> None:
    code = "import sys, dalle_torch.optim; print(dir(dalle_torch.optim), *sys.modules)"
    printed = run_python(code)
    assert "'DistributedShampoo'" in printed
    assert not {name.split(".")[0] for name in printed.split()}.intersection(HEAVY)
    code = "from dalle_torch.optim import DistributedShampoo; print(DistributedShampoo.__module__)"
    assert run_python(code) == "dalle_torch.optim.shampoo.optimizer"


@pytest.mark.parametrize("name", sorted(set(dalle_torch.__all__) - {"__version__"}))
def test_public_names_lead_to_their_classes(name: str) -> None:
    value = getattr(dalle_torch, name)
    assert isinstance(value, type)
    assert value.__name__ == name
    assert name in dir(dalle_torch)
    namespace: dict[str, object] = {}
    exec(f"from dalle_torch import {name}", namespace)
    assert namespace[name] is value


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'dalle_torch' has no attribute 'DalleBert'"):
        _ = dalle_torch.DalleBert
    assert not hasattr(dalle_torch, "nothing")


USE_AUTO_CLASSES = f"""
config = AutoConfig.from_pretrained({str(GOLDENS / "dallebart" / "normformer-glu")!r})
assert type(config).__name__ == "DalleBartConfig", type(config)
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_config(config)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
print(type(model).__module__, type(model).__name__, TOKENIZER_MAPPING[type(config)].__name__)
"""


@pytest.mark.parametrize(
    "order",
    [
        "import dalle_torch\nfrom transformers import AutoConfig",
        "from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer\nimport dalle_torch",
    ],
    ids=["package first", "transformers first"],
)
def test_auto_classes_know_dallebart_whatever_is_imported_first(order: str) -> None:
    assert run_python(order + USE_AUTO_CLASSES) == "dalle_torch.models.dalle_bart DalleBart DalleBartTokenizer"


def test_auto_classes_know_dallebart_in_a_process_that_has_imported_much(capsys: pytest.CaptureFixture[str]) -> None:
    exec("from transformers import AutoConfig" + USE_AUTO_CLASSES, {})
    assert capsys.readouterr().out.strip() == "dalle_torch.models.dalle_bart DalleBart DalleBartTokenizer"


def test_watched_modules_keep_their_own_loaders() -> None:
    from transformers.models.auto import configuration_auto

    for loader in (configuration_auto.__loader__, configuration_auto.__spec__.loader):
        assert isinstance(loader, SourceFileLoader)
    assert "class AutoConfig" in inspect.getsource(configuration_auto)


def test_installing_twice_watches_once() -> None:
    importlib.import_module("dalle_torch.auto_classes").install()
    assert sum(type(finder).__name__ == "_Watcher" for finder in sys.meta_path) == 1
