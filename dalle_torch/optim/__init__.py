"""Optimizers.

Owns: `DistributedShampoo`. Does not own: learning rates over time and the update around it (`training`), how its state
lies on a mesh (`parallel`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_torch.optim.shampoo.optimizer import DistributedShampoo as DistributedShampoo

__all__ = ["DistributedShampoo"]


def __getattr__(name: str) -> Any:
    # Importing the package must not cost the import of torch.
    if name != "DistributedShampoo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dalle_torch.optim.shampoo.optimizer import DistributedShampoo

    return DistributedShampoo


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
