"""DALL·E Mini and Mega in PyTorch and PyTorch/XLA.

Everything named in `__all__` is loaded when it is first touched: importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dalle_torch.auto_classes import install

if TYPE_CHECKING:
    from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.pipeline import DallePipeline
    from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer

__version__ = "0.1.0"

_HOMES = {
    "DalleBart": "dalle_torch.models.dalle_bart",
    "DalleBartConfig": "dalle_torch.models.configuration",
    "DalleBartProcessor": "dalle_torch.text",
    "DalleBartTokenizer": "dalle_torch.text",
    "DallePipeline": "dalle_torch.pipeline",
    "VQGAN": "dalle_torch.models.vqgan",
    "VQGANConfig": "dalle_torch.models.configuration",
}

__all__ = [
    "VQGAN",
    "DalleBart",
    "DalleBartConfig",
    "DalleBartProcessor",
    "DalleBartTokenizer",
    "DallePipeline",
    "VQGANConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
