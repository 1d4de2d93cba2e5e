"""How state lies on several devices, as far as the optimizer has to know.

Owns: what the optimizer asks for, and the answer where there is one device. Does not own: meshes (`parallel`).
"""

from collections.abc import Hashable
from typing import Literal, Protocol

from torch import Tensor

from dalle_torch.optim.shampoo.blocking import Region

Layout = Literal["blocks", "whole"]


class Sharding(Protocol):
    """The devices that an optimizer's state is spread over.

    Attributes:
        shards: stacks of matrices are filled up to a multiple of it, so that they can be split evenly.
    """

    shards: int

    def constrain(self, tensor: Tensor, layout: Layout | Tensor) -> Tensor:
        """`tensor`, laid out so; where there is something to mark, it is marked in place.

        Args:
            tensor: [N, ...].
            layout: "blocks" is how statistics and preconditioners are kept, split along N over every core; "whole" is
                the same everywhere; a parameter: `tensor` is [L, *shape], each as that one is.
        """
        ...

    def layout_of(self, parameter: Tensor) -> Hashable:
        """Only parameters for which this is equal are handled together."""
        ...

    def cut(self, region: Region, stack: Tensor, count: int, like: Tensor) -> Tensor:
        """`region.cut` of [L, *shape], filled up with zeros to `count` blocks and laid out as "blocks".

        Args:
            like: a parameter; the L lie as it does.
        """
        ...

    def paste(self, region: Region, blocks: Tensor, stack: Tensor, like: Tensor) -> None:
        """Write the blocks [count, *sizes] to where `cut` takes them from."""
        ...


class OneDevice:
    """The sharding of a single device: none."""

    shards = 1

    def constrain(self, tensor: Tensor, layout: Layout | Tensor) -> Tensor:
        return tensor

    def layout_of(self, parameter: Tensor) -> Hashable:
        return None

    def cut(self, region: Region, stack: Tensor, count: int, like: Tensor) -> Tensor:
        return region.cut(stack)

    def paste(self, region: Region, blocks: Tensor, stack: Tensor, like: Tensor) -> None:
        region.paste(blocks, stack)
