"""Stacks on their way to a checkpoint: their blocks, as they lie here, as parts of the tensors that lie in them.

Owns: from a planner's items of stacks those of their names, and the numbers of each. Does not own: where a part of a
block belongs (`index`), which blocks a process holds (`parallel.saving`), who writes what (`writing`).

A stack that is split over devices cannot be sliced there: each slice would be whole on every one of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dalle_torch.checkpoint.index import Stack
from dalle_torch.parallel.saving import save_planner


class Cutter:
    """What this process holds of tensors and of those in stacks, in the place of a planner.

    Attributes:
        items: `torch.distributed.checkpoint.planner.WriteItem`s of all; those of a block of a stack are neighbours.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stacks: Sequence[Stack]) -> None:
        times = Counter([*tensors, *(name for stack in stacks for name in stack.names)])
        if twice := [name for name, count in times.items() if count > 1]:
            raise ValueError(f"a checkpoint holds each tensor once, and these come twice: {', '.join(twice)}")
        joined = {f"stack {number} of {', '.join(stack.names[:1])}": stack for number, stack in enumerate(stacks)}
        self._planner: Any = save_planner({**tensors, **{key: stack.tensor for key, stack in joined.items()}})
        self._pieces: dict[tuple[str, tuple[int, ...]], tuple[Any, int, Stack]] = {}
        self._block: tuple[Any, Tensor] | None = None
        self.items: list[Any] = []
        for item in self._planner.create_local_plan().items:
            stack = joined.get(item.index.fqn)
            self.items += [item] if stack is None else self._cut(item, stack)

    def resolve_data(self, item: Any) -> Tensor:
        """The numbers of one of `items`."""
        piece = self._pieces.get((item.index.fqn, tuple(item.index.offset)))
        if piece is None:
            self._block = None
            return self._planner.resolve_data(item)
        whole, start, stack = piece
        if self._block is None or self._block[0] is not whole:
            self._block = None  # before the next one comes to the host's memory
            self._block = whole, self._planner.resolve_data(whole).detach()
        block = self._block[1]
        return block.narrow(0, start, item.tensor_data.chunk.sizes[0]) if stack.rows else block[start]

    def _cut(self, whole: Any, stack: Stack) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        found = []
        chunk = whole.tensor_data.chunk
        for name, offsets, sizes, start in stack.cut(tuple(chunk.offsets), tuple(chunk.sizes)):
            piece = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = replace(whole.tensor_data, chunk=piece, size=torch.Size(stack.shape))
            found.append(replace(whole, index=MetadataIndex(name, torch.Size(offsets)), tensor_data=data))
            self._pieces[name, offsets] = whole, start, stack
        return found
