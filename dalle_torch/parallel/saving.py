"""Which parts of each tensor a process holds, for torch.distributed.checkpoint: its planner, and torch_xla's mended.

Owns: the choice of a planner by where tensors lie, and that nothing is lost on torch_xla. Does not own: files, or which
process writes what (`checkpoint`), the way back (`loading`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlanner


def save_planner(tensors: Mapping[str, Tensor]) -> SavePlanner:
    """A planner that is set up; its local plan has each part that this process holds once, replicated tensors whole.

    Args:
        tensors: flat; on the CPU, on a GPU, DTensors or torch_xla's.
    """
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    planner: Any = DefaultSavePlanner(flatten_state_dict=False)
    if _on_xla(tensors):
        import torch_xla

        # What was recorded last is run now, by every host alike, and not when some host first reads a tensor.
        torch_xla.sync(wait=True)
        planner = _xla_save_planner()
    planner.set_up_planner(state, is_coordinator=True)
    return planner


def _on_xla(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.device.type == "xla" for tensor in tensors.values())


def _xla_save_planner() -> SavePlanner:
    """torch_xla's planner, with each part once.

    It lists a part for every local device that holds it. Taken for copies of several processes, all but those of one
    process are dropped later on, and where that is this one, all of them (torch_xla 2.9): such tensors were lost.
    """
    from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner

    class Planner(SPMDSavePlanner):
        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            once: dict[tuple[str, Any], Any] = {}
            for item in plan.items:
                once.setdefault((item.index.fqn, item.index.offset), item)
            plan.items[:] = once.values()
            return plan

        def lookup_object(self, index: Any) -> Any:
            # The parts of a tensor come to the host's memory together; those that others write are not to stay there.
            # One that was given out already is fetched again.
            shards = self._local_shards.get(index.fqn)
            if shards is None or shards[index.index] is None:
                self._local_shards.clear()
            found = super().lookup_object(index)
            # Of what is whole on every device; a view of it there would be a program.
            return found.cpu() if isinstance(found, Tensor) else found

    return Planner()
