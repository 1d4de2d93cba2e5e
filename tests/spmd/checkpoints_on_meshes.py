"""Checkpoints of tensors on eight virtual devices of the CPU, in a process of its own: SPMD is for all of a process.

    python -m tests.spmd.checkpoints_on_meshes FOLDER

FOLDER has `from-one`, a folder of checkpoints that a plain process has saved, and `from-one.safetensors` with the same.
Leaves in it `from-mesh`, saved on one mesh and loaded on the others, `from-mesh.safetensors`, and `seen.json`; and of
Distributed Shampoo, which keeps several parameters' state in one tensor, `shampoo` and `shampoo.safetensors`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.checkpoint.index import Stack
from dalle_torch.config import MeshConfig
from dalle_torch.optim import DistributedShampoo
from dalle_torch.parallel import spmd
from dalle_torch.parallel.rules import Spec
from tests.spmd.shampoo_on_meshes import MeshRun, start

SAVED_ON = (4, 2)
MESHES = [(8, 1), (2, 4), (4, 2), (1, 8)]
# Rows that no mesh divides, one that leaves devices with nothing, what is whole everywhere, what lies in one direction
# of the mesh and is copied along the other, as Shampoo's statistics do, and what no one has marked.
LAYOUT: dict[str, tuple[tuple[int, ...], torch.dtype, Spec | None]] = {
    "model/uneven": ((35, 6), torch.float32, ("mp", None)),
    "model/columns": ((6, 16), torch.float32, (None, "mp")),
    "model/bias": ((16,), torch.float32, (None,)),
    "model/half": ((16, 8), torch.bfloat16, ("mp", None)),
    "model/norm": ((7,), torch.float32, None),
    "optimizer/w/statistics": ((8, 4, 4), torch.float32, ("dp", None, None)),
    "optimizer/w/roots": ((16, 4, 4), torch.float32, (("dp", "mp"), None, None)),
    "optimizer/w/both": ((8, 8), torch.float32, ("dp", "mp")),
    "optimizer/w/few": ((3, 4), torch.float32, ("dp", None)),
    "optimizer/w/step": ((), torch.float32, None),
    "optimizer/w/count": ((), torch.int64, None),
    "optimizer/w/quantized": ((16, 4), torch.int8, ("dp", None)),
}


def state_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 50).to(dtype) for name, (shape, dtype, _) in LAYOUT.items()
    }


def placed(tensors: dict[str, Tensor], dp: int, mp: int) -> dict[str, Tensor]:
    import torch_xla

    _, mesh = spmd.start_mesh(MeshConfig(dp=dp, mp=mp))
    found = {}
    for name, value in tensors.items():
        found[name] = value.to("xla")
        spec = LAYOUT[name][2]
        if spec is not None:
            spmd.mark(found[name], mesh, spec)
    torch_xla.sync()
    return found


def same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of those that differ in a bit."""
    return [name for name, value in expected.items() if not torch.equal(tensors[name].cpu(), value)]


def stacks_of(optimizer: DistributedShampoo) -> list[Stack]:
    return [
        Stack(stack.tensor, [f"{key}/{stack.kind}" for key in stack.keys], stack.rows)
        for stack in optimizer.state_stacks()
    ]


def sliced(stacks: list[Stack]) -> dict[str, Tensor]:
    """What lies in stacks, by name, on the CPU."""
    found = {}
    for stack in stacks:
        rows, whole = stack.rows, stack.tensor.cpu()
        for number, name in enumerate(stack.names):
            found[name] = (whole[number * rows : (number + 1) * rows] if rows else whole[number]).clone()
    return found


def save_shampoo(folder: Path) -> dict[str, Any]:
    """Save the state after a step, at once and from behind, and load it into other meshes."""
    import torch_xla
    from torch_xla.debug import metrics

    run = MeshRun(*SAVED_ON, start())
    run.step(0)
    checkpoints = CheckpointFolder(str(folder / "shampoo"))
    weights, stacks = dict(run.parameters), stacks_of(run.optimizer)
    before = metrics.counter_value("UncachedCompile")
    checkpoints.save(1, weights, {}, stacks=stacks)
    checkpoints.save(2, weights, {}, stacks=stacks, asynchronous=True)
    seen: dict[str, Any] = {"compiled": metrics.counter_value("UncachedCompile") - before, "differ": {}}
    expected = sliced(stacks)
    for value in [*weights.values(), *(stack.tensor for stack in stacks)]:
        value.detach().zero_()
    torch_xla.sync()
    checkpoints.wait()
    save_file(expected, folder / "shampoo.safetensors")
    seen["split"] = sorted(
        {name.rpartition("/")[2] for stack in stacks for name in stack.names if _is_split(stack.tensor)}
    )
    for mesh in MESHES:
        other = MeshRun(*mesh, start())
        into = stacks_of(other.optimizer)
        checkpoint = checkpoints.newest()
        assert checkpoint is not None
        checkpoint.load(other.parameters, into)
        torch_xla.sync()
        seen["differ"]["{}x{}".format(*mesh)] = same(sliced(into), expected)
    return seen


def _is_split(tensor: Tensor) -> bool:
    return tensor.device.type == "xla" and "devices" in str(spmd.layout_of(tensor))


def main(folder: Path) -> None:
    import torch_xla

    expected = state_of(1)
    save_file(expected, folder / "from-mesh.safetensors")
    checkpoints = CheckpointFolder(str(folder / "from-mesh"), keep=9)
    tensors = placed(expected, *SAVED_ON)
    checkpoints.save(1, tensors, {"mesh": SAVED_ON})
    checkpoints.save(2, tensors, {"mesh": SAVED_ON}, asynchronous=True)
    for value in tensors.values():
        value.zero_()
    torch_xla.sync()
    checkpoints.wait()
    seen: dict[str, Any] = {"names": [], "differ": {}, "moved": {}}
    for mesh in MESHES:
        name = "{}x{}".format(*mesh)
        for source, wanted in (("from-mesh", expected), ("from-one", load_file(folder / "from-one.safetensors"))):
            into = placed({key: torch.zeros_like(value) for key, value in wanted.items()}, *mesh)
            layouts = {key: spmd.layout_of(value) for key, value in into.items()}
            checkpoint = CheckpointFolder(str(folder / source)).newest()
            assert checkpoint is not None
            checkpoint.load(into)
            # What is computed with them next has to find them laid out as they were.
            torch_xla.sync()
            seen["differ"][f"{source} {name}"] = same(into, wanted)
            seen["moved"][f"{source} {name}"] = [
                key for key, value in into.items() if spmd.layout_of(value) != layouts[key]
            ]
        # And back, from each mesh to a process without one.
        CheckpointFolder(str(folder / f"back-{name}")).save(1, into, {})
    seen["shampoo"] = save_shampoo(folder)
    seen["names"] = sorted(checkpoints.newest().shapes)  # type: ignore[union-attr]
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
