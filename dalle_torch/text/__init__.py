"""From a prompt to the ids that the encoder reads: normalisation, tokens, conditional and unconditional batches.

Owns: everything that happens to a prompt before the model. Does not own: the model, or where a source leads
(`storage`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_torch.text.normalizer import TextNormalizer as TextNormalizer
    from dalle_torch.text.processor import DalleBartProcessor as DalleBartProcessor
    from dalle_torch.text.tokenizer import DalleBartTokenizer as DalleBartTokenizer

_HOMES = {"DalleBartProcessor": "processor", "DalleBartTokenizer": "tokenizer", "TextNormalizer": "normalizer"}

__all__ = ["DalleBartProcessor", "DalleBartTokenizer", "TextNormalizer"]


def __getattr__(name: str) -> Any:
    # The normaliser alone must not cost the import of transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
