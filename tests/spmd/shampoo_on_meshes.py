"""Distributed Shampoo on eight virtual devices of the CPU, in a process of its own: SPMD is for all of a process.

    python -m tests.spmd.shampoo_on_meshes FOLDER

Trains the same parameters on each mesh, and leaves in FOLDER `DPxMP.json` with what was seen after each step and
`DPxMP.safetensors` with the parameters at the end; `resumed` changed the mesh halfway.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_torch.optim import DistributedShampoo
from dalle_torch.optim.shampoo import preconditioner

MESHES = [(8, 1), (4, 2), (2, 4)]
SHAPES = {"query": (16, 16), "key": (16, 16), "odd": (10, 16), "embedding": (40, 16), "scale": (16,)}
SETTINGS: dict[str, Any] = {
    "lr": 0.05, "block_size": 8, "merge_small_dims_block_size": 16, "start_preconditioning_step": 3,
    "preconditioning_compute_steps": 3, "skip_preconditioning_dim_size_gt": 32, "root_method": "newton",
}  # fmt: skip
SELDOM = {"statistics_compute_steps": 2}
CHANGES: list[dict[str, Any]] = [
    {}, {}, {"weight_decay": 0.1}, {"beta1": 0.95}, {"beta2": 0.98}, {"preconditioning_compute_steps": 2},
    {"start_preconditioning_step": 8}, {"weight_decay": 0.0, "beta1": 0.0}, {"beta2": 1.0}, {"lr": 0.0},
    {"preconditioning_compute_steps": 1, "lr": 0.02, "weight_decay": 0.3},
]  # fmt: skip
"""Settings that are changed before each step of a run."""
LATE = {"start_preconditioning_step": 7}
STEPS = 8
HALF = 4


def spec_of(parameter: Tensor) -> tuple[str | None, ...]:
    """As a model would be: matrices that divide evenly are split over mp, others not."""
    return ("mp", None) if parameter.ndim == 2 and parameter.shape[0] % 8 == 0 else (None,) * parameter.ndim


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    steady = torch.linspace(-1, 1, math.prod(SHAPES[name])).view(SHAPES[name])
    return steady + torch.randn(SHAPES[name], generator=generator)


def change(optimizer: torch.optim.Optimizer, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        optimizer.param_groups[0][name] = value


def give_gradients(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients and learning rate of a step."""
    for name, parameter in named.items():
        parameter.grad = gradient(name, step).to(parameter.device)
    optimizer.param_groups[0]["lr"] = SETTINGS["lr"] / (1 + step)


class MeshRun:
    """The parameters and their optimizer on a mesh."""

    def __init__(self, dp: int, mp: int, values: Mapping[str, Tensor], **settings: Any) -> None:
        import numpy as np
        import torch_xla
        from torch_xla.distributed import spmd

        from dalle_torch.parallel.shampoo import ShampooSharding

        mesh = spmd.Mesh(np.arange(dp * mp), (dp, mp), ("dp", "mp"))
        self.root_specs: set[str] = set()
        taken = preconditioner.inverse_roots

        def inverse_roots(matrices: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
            self.root_specs.add(torch_xla._XLAC._get_xla_sharding_spec(matrices))
            return taken(matrices, *settings)

        preconditioner.inverse_roots = inverse_roots
        self.parameters = {name: nn.Parameter(value.to("xla")) for name, value in values.items()}
        for parameter in self.parameters.values():
            spmd.mark_sharding(parameter, mesh, spec_of(parameter))
        self.optimizer = DistributedShampoo(
            self.parameters.items(), **SETTINGS | settings, sharding=ShampooSharding(mesh, spec_of)
        )
        self.optimizer.prepare()
        torch_xla.sync()

    def step(self, step: int, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One step; what there is to see after it."""
        import torch_xla
        from torch_xla.debug import metrics

        give_gradients(self.parameters, self.optimizer, step)
        change(self.optimizer, changes or {})
        torch_xla.sync()
        seen: dict[str, Any] = {"roots": self.optimizer.roots_due}
        reads, compilations = self._count("TransferFromDeviceTime"), self._compilations()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch_xla.sync()
        seen["reads"] = self._count("TransferFromDeviceTime") - reads
        seen["compilations"], seen["compile_times"] = (
            now - before for now, before in zip(self._compilations(), compilations, strict=True)
        )
        seen["fallbacks"] = sorted(name for name in metrics.counter_names() if name.startswith("aten::"))
        seen["specs"] = {
            f"{index}/{name}": torch_xla._XLAC._get_xla_sharding_spec(tensor)
            for index, bucket in enumerate(self.optimizer._buckets[0])
            for name, tensor, _ in bucket.tensors()
            if tensor.device.type == "xla"
        }
        seen["parameter_specs"] = {
            name: torch_xla._XLAC._get_xla_sharding_spec(parameter) for name, parameter in self.parameters.items()
        }
        return seen

    @classmethod
    def _compilations(cls) -> tuple[int, int]:
        from torch_xla.debug import metrics

        # The second also counts what is compiled to find out how a result is split.
        return metrics.counter_value("UncachedCompile") or 0, cls._count("CompileTime")

    @staticmethod
    def _count(metric: str) -> int:
        """How often something was measured, as values fetched from the devices."""
        from torch_xla.debug import metrics

        data = metrics.metric_data(metric)
        return data[0] if data else 0

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        states = {
            name: {kind: tensor.cpu().clone() for kind, tensor in of_name.items()}
            for name, of_name in state["state"].items()
        }
        return {"state": states, "param_groups": state["param_groups"]}


def main(folder: Path) -> None:
    import torch_xla.runtime as xr

    xr.use_spmd()
    half: dict[tuple[int, int], Any] = {}
    for dp, mp in MESHES:
        run, seen = MeshRun(dp, mp, start()), []
        for step in range(STEPS):
            if step == HALF and (dp, mp) == MESHES[0]:
                half[dp, mp] = run.values(), run.state()
            seen.append(run.step(step))
        failures = {name: int(of_name["root_failures"]) for name, of_name in run.state()["state"].items()}
        report = {"steps": seen, "root_specs": sorted(run.root_specs), "failures": failures}
        (folder / f"{dp}x{mp}.json").write_text(json.dumps(report), encoding="utf-8")
        save_file(run.values(), folder / f"{dp}x{mp}.safetensors")
    values, state = half[MESHES[0]]
    resumed = MeshRun(*MESHES[-1], values)
    resumed.optimizer.load_state_dict(state)
    for step in range(HALF, STEPS):
        resumed.step(step)
    save_file(resumed.values(), folder / "resumed.safetensors")
    # Roots are due in steps that take no statistics.
    seldom = MeshRun(*MESHES[1], start(), **SELDOM)
    for step in range(STEPS):
        seldom.step(step)
    save_file(seldom.values(), folder / "seldom.safetensors")
    for dp, mp in MESHES:
        changed = MeshRun(dp, mp, start(), **LATE)
        seen = [changed.step(step, changes) for step, changes in enumerate(CHANGES)]
        (folder / f"changed-{dp}x{mp}.json").write_text(json.dumps({"steps": seen}), encoding="utf-8")
        save_file(changed.values(), folder / f"changed-{dp}x{mp}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
