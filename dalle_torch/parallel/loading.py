"""Which parts of tensors a process reads from a checkpoint, and their way to its devices: planners for
torch.distributed.checkpoint.

Owns: the choice of a planner by where tensors lie; on torch_xla, that a host reads what its devices hold and has one
tensor at a time in its memory. Does not own: files, checks of them (`checkpoint`).

torch_xla's own planner (`SPMDLoadPlanner`, torch_xla 2.9) fetches every shard from the devices before it is filled,
each as often as devices hold it, and leaves whole tensors waiting in the host's memory until the next step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlanner

WAITING = 1 << 26
"""Bytes of tensors that are whole on every device which may wait in the host's memory to be sent."""
_TILES = re.compile(r"\{devices=\[([\d,]+)\]")


def load_planner(tensors: Mapping[str, Tensor], metadata: Any) -> LoadPlanner:
    """A planner that is set up to read parts of `tensors` in place, as they lie here.

    Args:
        tensors: flat; on the CPU, on a GPU, DTensors or torch_xla's.
        metadata: `torch.distributed.checkpoint.metadata.Metadata` of what there is.
    """
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    on_xla = any(tensor.device.type == "xla" for tensor in tensors.values())
    planner: Any = MeshLoadPlanner() if on_xla else DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(state, metadata, False)
    return planner


class MeshLoadPlanner(DefaultLoadPlanner):
    """Reads torch_xla's tensors too; the items of one tensor have to be read one after the other.

    Every process has to read all its items: the last ones of some tensors wait for the devices.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self._held: dict[str, HeldBlocks] = {}
        self._waiting = 0

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        import torch_xla

        # What a layout is can be asked of what is on the devices.
        torch_xla.sync(wait=True)
        on_devices = {name: tensor for name, tensor in state_dict.items() if tensor.device.type == "xla"}
        others = {name: tensor for name, tensor in state_dict.items() if name not in on_devices}
        super().set_up_planner(others, metadata, is_coordinator)
        devices = _order_of_shards(list(on_devices.values()))
        self._held = {name: HeldBlocks(tensor, devices) for name, tensor in on_devices.items()}

    def create_local_plan(self) -> Any:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        assert self.metadata is not None
        plan = super().create_local_plan()
        for name, held in self._held.items():
            chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(size)) for start, size in held.blocks]
            saved: Any = self.metadata.state_dict_metadata[name]
            items = create_read_items_for_chunk_list(name, saved, chunks)
            held.awaited = sum(math.prod(item.lengths) for item in items)
            plan.items.extend(items)
        return plan

    def resolve_tensor(self, read_item: Any) -> Tensor:
        held = self._held.get(read_item.dest_index.fqn)
        if held is None:
            return super().resolve_tensor(read_item)
        target = held.buffer(tuple(read_item.dest_index.offset))
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        held = self._held.get(read_item.dest_index.fqn)
        if held is None:
            return super().commit_tensor(read_item, tensor)
        held.awaited -= math.prod(read_item.lengths)
        if not held.awaited:
            self._waiting += held.send()
            if self._waiting > WAITING:
                import torch_xla

                torch_xla.sync(wait=True)
                self._waiting = 0


class HeldBlocks:
    """The blocks of one of torch_xla's tensors that this host's devices hold, each once however many hold it.

    Args:
        tensor: on the devices.
        devices: of this host, in the order in which torch_xla names the shards of a tensor.

    Attributes:
        blocks: offsets and sizes of each.
        awaited: elements that are still to be read.
    """

    def __init__(self, tensor: Tensor, devices: Sequence[str]) -> None:
        self.tensor, self.devices = tensor, devices
        self.tile = _tile_of(tensor)
        self.awaited = 0
        self._buffers: dict[tuple[int, ...], Tensor] = {}
        self._of_devices: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        if self.tile is None:
            self._of_devices.append(((0,) * tensor.ndim, tuple(tensor.shape)))
        else:
            import torch_xla

            (shards,) = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])
            for _, slices in shards:
                starts = tuple(int(part.start) for part in slices)
                self._of_devices.append((starts, tuple(int(part.stop) - int(part.start) for part in slices)))
        self.blocks = [block for block in dict.fromkeys(self._of_devices) if math.prod(block[1])]

    def buffer(self, start: tuple[int, ...]) -> Tensor:
        """Where the block that begins at `start` is put together, with the filling that its device has."""
        if not self._buffers:
            self._begin()
        return self._buffers[start]

    def _begin(self) -> None:
        shape = tuple(self.tensor.shape) if self.tile is None else self.tile
        if self.awaited == sum(math.prod(size) for _, size in self.blocks):
            made = {start: torch.zeros(shape, dtype=self.tensor.dtype) for start, _ in self._of_devices}
        elif self.tile is None:
            made = {self.blocks[0][0]: self.tensor.cpu()}
        else:
            # What is not read stays as it is.
            import torch_xla

            (shards,) = torch_xla._XLAC._get_local_shards([self.tensor])
            made = {}
            for (start, _), (data, _) in zip(self._of_devices, shards, strict=True):
                made.setdefault(start, data)
        self._buffers = made

    def send(self) -> int:
        """Give the devices what was read; returns the bytes that wait for the next program to be sent."""
        buffers, self._buffers = self._buffers, {}
        if self.tile is None:
            (buffer,) = buffers.values()
            self.tensor.copy_(buffer)
            return buffer.nbytes
        import torch_xla

        data = [buffers[start] for start, _ in self._of_devices]
        torch_xla._XLAC._load_local_shards(self.tensor, data, list(self.devices))
        return 0


def _tile_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of a device's block, filled up where it does not come out even; None: all devices hold all of it."""
    import torch_xla

    found = _TILES.match(torch_xla._XLAC._get_xla_sharding_spec(tensor))
    if found is None:
        return None
    counts = [int(count) for count in found[1].split(",")][: tensor.ndim]
    return tuple(-(-size // count) for size, count in zip(tensor.shape, counts, strict=True))


def _order_of_shards(tensors: Sequence[Tensor]) -> list[str]:
    """The names of this host's devices as the shards of a tensor are listed, seen at the smallest tensor of `tensors`
    that is split; its blocks are fetched for that."""
    split = [tensor for tensor in tensors if _tile_of(tensor) is not None]
    if not split:
        return []
    import torch_xla

    (shards,) = torch_xla._XLAC._get_local_shards([min(split, key=lambda tensor: tensor.numel())])
    return [device for _, device in shards]
