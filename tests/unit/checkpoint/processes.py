"""Two processes, as torchrun starts them, that save and load together.

    python -m tests.unit.checkpoint.processes FOLDER

Leaves in FOLDER `seen-RANK.json` with what happened and `spread.safetensors`, `loaded.safetensors` with whole tensors.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.checkpoint.store import Store
from tests.unit.checkpoint.states import equal, state


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def folder_of(folder: Path) -> CheckpointFolder:
    rank, count = dist.get_rank(), dist.get_world_size()
    return CheckpointFolder(str(folder), host_index=rank, host_count=count, barrier=dist.barrier, gather=gather)


def spread_state() -> tuple[nn.Module, dict[str, Tensor]]:
    """FSDP2 and AdamW after a step; rows that two do not divide, and one that leaves the second process nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(1, 4, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer/{name}/{kind}": value for kind, value in optimizer.state[parameter].items()}
    return model, tensors


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def failure(folder: Path, rank: int, asynchronous: bool) -> str:
    """What a save says where one of the processes has no room, and a later one that has."""
    checkpoints = folder_of(folder)
    checkpoints.save(1, state(1), {})

    def full(self: Store, folder: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    original, message = Store.writer, ""
    tensors = spread_state()[1]
    if dist.get_rank() == rank:
        Store.writer = full  # type: ignore[method-assign]
    try:
        checkpoints.save(2, tensors, {}, asynchronous=asynchronous)
        checkpoints.wait()
    except OSError as error:
        message = str(error)
    Store.writer = original  # type: ignore[method-assign]
    assert checkpoints.steps() == [1]
    dist.barrier()
    checkpoints.save(2, tensors, {})
    assert checkpoints.steps() == [1, 2]
    return message


def refused(folder: Path, of_rank: dict[str, Tensor]) -> str:
    try:
        folder_of(folder).save(1, of_rank, {})
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen: dict[str, Any] = {}

    _, tensors = spread_state()
    tensors["model/replicated"] = torch.arange(6.0)
    expected = whole(tensors)
    if rank == 0:
        save_file(expected, folder / "spread.safetensors")
    checkpoints = folder_of(folder / "spread")
    checkpoints.save(10, tensors, {"rank": rank}, {"rank": rank})
    checkpoints.save(20, tensors, {"rank": rank}, {"rank": rank}, asynchronous=True)
    with torch.no_grad():
        for value in tensors.values():
            value.zero_()  # the training goes on
    checkpoints.wait()
    for _ in range(2):
        checkpoint = checkpoints.newest()
        assert checkpoint is not None
        checkpoint.load(tensors)
        assert equal(whole(tensors), expected)
    seen["hosts"] = checkpoint.host_metas

    folder_of(folder / "copies").save(1, state(1), {})

    one = CheckpointFolder(str(folder / "one")).newest()  # of a single process
    assert one is not None
    one.load(tensors)
    loaded = whole(tensors)
    if rank == 0:
        save_file(loaded, folder / "loaded.safetensors")

    for failing in (0, 1):
        for asynchronous in (False, True):
            name = f"{failing}-{asynchronous}"
            seen[name] = failure(folder / f"full-{name}", failing, asynchronous)
    seen["differ"] = refused(folder / "differ", {"a": torch.zeros(2 + rank)})
    seen["odd"] = refused(folder / "odd", {"a": torch.zeros(2) if rank else object()})  # type: ignore[dict-item]
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
