"""Prompt to pictures: `DallePipeline`, and the parts that it is put together from.

The name is found on first use, so that a part alone, such as `output`, costs no import of the models.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_torch.pipeline.pipeline import DallePipeline

__all__ = ["DallePipeline"]


def __getattr__(name: str) -> Any:
    if name == "DallePipeline":
        from dalle_torch.pipeline.pipeline import DallePipeline

        return DallePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
