"""Whether every way to train computes what one device does: five steps of Shampoo on meshes, with and without tricks.

    python -m benchmarks.training_equality [--only NAME ...] [--output FILE.json]

Each mesh is made of eight virtual devices of the CPU; "one device" is a plain CPU with accelerate. The table shows,
against it: the largest relative difference of a loss and of a gradient's norm, the largest difference of a parameter
relative to the distance that it moved, and how many programs XLA compiled in each step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS = 5
ROWS = 24
"""Samples of an update, in one pass or in three."""


@dataclass(frozen=True)
class Variant:
    """A way to train; the first three numbers are the mesh and the passes of an update."""

    dp: int = 8
    mp: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    scan: bool = False
    precision: str = "float32"
    optimizer: str = "shampoo"
    layout: str = "normformer"

    @property
    def reference(self) -> "Variant":
        """The same on one device, by the plainest way."""
        return Variant(1, 1, 1, False, False, self.precision, self.optimizer, self.layout)


VARIANTS = {
    "8x1": Variant(8, 1),
    "4x2": Variant(4, 2),
    "2x4": Variant(2, 4),
    "1x8": Variant(1, 8),
    "4x2, checkpointing": Variant(4, 2, checkpointing=True),
    "4x2, scan": Variant(4, 2, scan=True),
    "4x2, scan, checkpointing": Variant(4, 2, scan=True, checkpointing=True),
    "4x2, accumulation 3": Variant(4, 2, 3),
    "4x2, accumulation 3, checkpointing": Variant(4, 2, 3, checkpointing=True),
    "4x2, accumulation 3, scan, checkpointing": Variant(4, 2, 3, scan=True, checkpointing=True),
    "4x2, unequal layers": Variant(4, 2, layout="swinv2"),
    "4x2, scan, unequal layers": Variant(4, 2, scan=True, checkpointing=True, layout="swinv2"),
    "4x2, adamw": Variant(4, 2, optimizer="adamw"),
    "4x2, adafactor": Variant(4, 2, optimizer="adafactor"),
    "4x2, bfloat16": Variant(4, 2, precision="bfloat16"),
    "4x2, bfloat16, scan, checkpointing": Variant(4, 2, scan=True, checkpointing=True, precision="bfloat16"),
}

# 39 rows of image tokens and 23 inner features, which no mp divides.
MODEL: dict[str, Any] = {
    "encoder_layers": 3, "decoder_layers": 3, "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 23, "decoder_ffn_dim": 24, "encoder_vocab_size": 40, "image_vocab_size": 38, "image_length": 8,
    "max_text_length": 8, "dropout": 0.0, "use_glu": True, "init_std": 0.2,
}  # fmt: skip
SHAMPOO: dict[str, Any] = {
    "block_size": 8, "preconditioning_compute_steps": 3, "start_preconditioning_step": 2, "root_method": "newton",
    "skip_preconditioning_dim_size_gt": 32, "merge_small_dims_block_size": 16,
}  # fmt: skip


def batches(step: int, accumulation: int) -> list[dict[str, Any]]:
    """Prompts of several lengths with their pictures' tokens, the same rows however they are parted."""
    import torch

    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 9, (ROWS, 1), generator=generator)
    whole = {
        "input_ids": torch.randint(MODEL["encoder_vocab_size"], (ROWS, 8), generator=generator),
        "attention_mask": (torch.arange(8) < lengths).long(),
        "labels": torch.randint(MODEL["image_vocab_size"], (ROWS, 8), generator=generator),
    }
    parts = {name: value.chunk(accumulation) for name, value in whole.items()}
    return [{name: of_name[index] for name, of_name in parts.items()} for index in range(accumulation)]


def train(variant: Variant, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What there was to see in each step, and the parameters at the end."""
    import torch

    from dalle_torch.config import MeshConfig, OptimizerConfig, RuntimeConfig, ShampooConfig, TrainingConfig
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.optim.build import build_optimizer, prepare
    from dalle_torch.parallel.engine import start_engine
    from dalle_torch.parallel.rules import layout_rules
    from dalle_torch.training.step import TrainStep

    mesh = MeshConfig(dp=variant.dp, mp=variant.mp, uneven="pad") if backend == "xla" else MeshConfig()
    engine = start_engine(RuntimeConfig(backend=backend, device="cpu"), mesh)
    torch.manual_seed(0)
    model = DalleBart(DalleBartConfig(**MODEL, ln_positions=variant.layout)).train()
    called = engine.place(model, layout_rules(model.config))
    shampoo = ShampooConfig(**SHAMPOO) if variant.optimizer == "shampoo" else None
    eps = None if variant.optimizer == "adafactor" else 1e-6
    settings = OptimizerConfig(name=variant.optimizer, lr=0.02, weight_decay=0.01, eps=eps, shampoo=shampoo)
    optimizer = build_optimizer(model, settings, **engine.optimizer_options(variant.optimizer))
    prepare(optimizer)
    engine.place_state(optimizer)
    training = TrainingConfig(
        precision=variant.precision, gradient_checkpointing=variant.checkpointing, use_scan=variant.scan
    )
    step = TrainStep(engine, model, called, optimizer, training)
    seen: dict[str, Any] = {"losses": [], "norms": [], "compilations": [], "layout": []}
    for index in range(STEPS):
        compilations = _compilations(backend)
        metrics = step(batches(index, variant.accumulation), lr=0.02 / (1 + index), max_grad_norm=1.0 + index)
        seen["compilations"].append(_compilations(backend) - compilations)
        seen["losses"].append(metrics["loss"].item())
        seen["norms"].append(metrics["grad_norm"].item())
        if backend == "xla":
            seen["layout"].append(_layout_problems(engine, model, optimizer))
    return seen, {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _compilations(backend: str) -> int:
    if backend != "xla":
        return 0
    from torch_xla.debug import metrics

    return metrics.counter_value("UncachedCompile") or 0


def _layout_problems(engine: Any, model: Any, optimizer: Any) -> str:
    """How parameters and state of torch's optimizers lie otherwise than they should."""
    from dalle_torch.parallel import spmd
    from dalle_torch.parallel.rules import spec_of_state

    try:
        spmd.check_layout(model, engine.xla_mesh, engine.specs)
    except RuntimeError as error:
        return str(error)
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value.device.type != "xla":
                continue
            spec = spec_of_state(value.shape, parameter.shape, engine.specs[name])
            wanted = spmd.layout_of(spmd.mark(value.new_zeros((1,) * len(spec)), engine.xla_mesh, spec))
            if spec and spmd.layout_of(value) != wanted:
                return f"{kind} of {name} lies as {spmd.layout_of(value)}, not as {wanted}"
    return ""


def work(names: Sequence[str], backend: str, folder: Path) -> None:
    """In a process of its own: train, and leave NAME.json and NAME.safetensors."""
    from safetensors.torch import save_file

    for name in names:
        variant = VARIANTS[name] if backend == "xla" else VARIANTS[name].reference
        seen, parameters = train(variant, backend)
        (folder / f"{name}.{backend}.json").write_text(json.dumps(seen), encoding="utf-8")
        save_file(parameters, folder / f"{name}.{backend}.safetensors")


def compare(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Train all of them, and on one device; returns for each what there was to see and how far it is from that."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first_of = {VARIANTS[name].reference: name for name in reversed(names)}
        _run("accelerate", list(first_of.values()), place)
        for together in _processes(names):
            _run("xla", together, place)
        return {name: _difference(folder, name, first_of[VARIANTS[name].reference]) for name in names}


def _processes(names: Sequence[str]) -> list[list[str]]:
    """Which variants share a process: what is compiled stays in memory until it ends, and Shampoo's is much."""
    alone = [[name] for name in names if VARIANTS[name].optimizer == "shampoo"]
    small = [name for name in names if VARIANTS[name].optimizer != "shampoo"]
    return alone + ([small] if small else [])


def _run(backend: str, names: Sequence[str], folder: str) -> None:
    command = [sys.executable, "-m", "benchmarks.training_equality", "--work", backend, folder, "--only", *names]
    # Code for a few small steps is not worth optimising.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    there = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "XLA_FLAGS": flags} if backend == "xla" else {}
    environment = os.environ | {"USE_TORCH_XLA": "1" if backend == "xla" else "0"} | there
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"training with {backend} failed ({', '.join(names)}): {done.stderr[-4000:]}")


def _difference(folder: Path, name: str, reference: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart

    seen = json.loads((folder / f"{name}.xla.json").read_text(encoding="utf-8"))
    expected = json.loads((folder / f"{reference}.accelerate.json").read_text(encoding="utf-8"))
    for what in ("losses", "norms"):
        pairs = zip(seen[what], expected[what], strict=True)
        seen[f"{what}_difference"] = max(abs(found - wanted) / abs(wanted) for found, wanted in pairs)
    seen["losses_of_one_device"] = expected["losses"]
    torch.manual_seed(0)
    start = DalleBart(DalleBartConfig(**MODEL, ln_positions=VARIANTS[name].layout)).state_dict()
    found = load_file(folder / f"{name}.xla.safetensors")
    wanted = load_file(folder / f"{reference}.accelerate.safetensors")
    assert found.keys() == wanted.keys()
    shares = {key: ((found[key] - wanted[key]).norm() / (wanted[key] - start[key]).norm()).item() for key in wanted}
    seen["worst_parameter"], seen["parameters_difference"] = max(shares.items(), key=lambda item: item[1])
    return seen


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| variant | losses | norms | parameters | compiled in steps 0-4 |", "|---|---|---|---|---|"]
    for name, seen in results.items():
        numbers = " | ".join(f"{seen[f'{what}_difference']:.1e}" for what in ("losses", "norms", "parameters"))
        lines.append(f"| {name} | {numbers} | {' '.join(map(str, seen['compilations']))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="all that was seen, as JSON")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.only, options.work[0], Path(options.work[1]))
        return
    results = compare(options.only)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
