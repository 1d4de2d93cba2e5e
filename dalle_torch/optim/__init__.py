"""Optimizers.

Owns: `DistributedShampoo`, optimizers from a run's options (`build`), their state by name (`saving`), the learning rate
over time (`schedules`). Does not own: the update around them (`training`), how state lies on a mesh (`parallel`).
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
