"""A small DalleBart on eight virtual devices of the CPU, in a process of its own: SPMD is for all of a process.

    python -m tests.spmd.model_on_meshes FOLDER

Takes a few steps on each mesh, and leaves in FOLDER `DPxMP.json` with what was seen after each step and
`DPxMP.safetensors` with the logits and gradients of the first step and the parameters at the end.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_torch.config import MeshConfig
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.parallel import spmd
from dalle_torch.parallel.rules import Spec, lay_out, layout_rules

MESHES = [(8, 1), (4, 2), (2, 4)]
STEPS = 3
LEARNING_RATE = 0.1
BATCH = 8
# Every kind of parameter there is, and sizes that neither 2 nor 4 divides: 35 rows of image tokens, 23 inner features.
OPTIONS: dict[str, Any] = {
    "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 23, "decoder_ffn_dim": 24, "encoder_vocab_size": 40, "image_vocab_size": 34, "image_length": 8,
    "max_text_length": 8, "dropout": 0.0, "use_bias": True, "use_glu": True, "use_head_scale": True, "init_std": 0.2,
    "use_swin_position_embeddings": True,
}  # fmt: skip


def make_model() -> DalleBart:
    """The same model each time."""
    torch.manual_seed(0)
    return DalleBart(DalleBartConfig(**OPTIONS)).train()


def specs_of(model: DalleBart, sizes: dict[str, int]) -> dict[str, Spec]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return lay_out(shapes, layout_rules(model.config), sizes, "pad")


def make_batch() -> dict[str, Tensor]:
    """Prompts of several lengths, with their pictures' tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, OPTIONS["max_text_length"] + 1, (BATCH, 1), generator=generator)
    return {
        "input_ids": torch.randint(OPTIONS["encoder_vocab_size"], (BATCH, 8), generator=generator),
        "attention_mask": (torch.arange(8) < lengths).long(),
        "labels": torch.randint(OPTIONS["image_vocab_size"], (BATCH, 8), generator=generator),
    }


def descend(model: DalleBart) -> None:
    """One step of plain gradient descent, whose updates are the gradients themselves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=LEARNING_RATE)


def train_on(dp: int, mp: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What there is to see of some steps on a mesh."""
    import torch_xla
    from torch_xla.debug import metrics

    plan, mesh = spmd.start_mesh(MeshConfig(dp=dp, mp=mp))
    model = make_model()
    specs = specs_of(model, plan.sizes)
    spmd.place(model, torch_xla.device(), mesh, specs)
    batch = {name: spmd.mark(value.to("xla"), mesh, ("dp", None)) for name, value in make_batch().items()}
    torch_xla.sync()
    seen: dict[str, Any] = {"plan": str(plan), "losses": [], "layouts": [], "compilations": []}
    seen["complaint"] = complaint(model, mesh, specs)
    seen["parts"] = parts(model.lm_head.weight)
    tensors: dict[str, Tensor] = {}
    for step in range(STEPS):
        compilations = metrics.counter_value("UncachedCompile") or 0
        output = model(**batch)
        output.loss.backward()
        spmd.mark_gradients(model, mesh, specs)
        descend(model)
        torch_xla.sync()
        seen["compilations"].append((metrics.counter_value("UncachedCompile") or 0) - compilations)
        spmd.check_layout(model, mesh, specs)
        seen["losses"].append(output.loss.item())
        seen["layouts"].append({name: spmd.layout_of(value) for name, value in model.named_parameters()})
        seen["layouts"].append({name: spmd.layout_of(value.grad) for name, value in model.named_parameters()})
        if step == 0:
            tensors["logits"] = output.logits.detach().cpu()
            tensors |= {f"{name}.grad": value.grad.cpu() for name, value in model.named_parameters()}
        model.zero_grad()
    return seen, tensors | {name: value.detach().cpu() for name, value in model.named_parameters()}


def parts(parameter: Tensor) -> list[list[int]]:
    """What each device holds of a parameter, without the filling."""
    from torch_xla.distributed.spmd import wrap_if_sharded

    return [list(shard.unpadded_data.shape) for shard in wrap_if_sharded(parameter.detach()).local_shards]


def complaint(model: DalleBart, mesh: Any, specs: dict[str, Spec]) -> str:
    """What is said of two parameters that should lie otherwise; of the rest there is nothing to say."""
    spmd.check_layout(model, mesh, specs)
    try:
        spmd.check_layout(model, mesh, specs | {"lm_head.weight": (None, "mp"), "encoder.final_norm.bias": ("dp",)})
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    for dp, mp in MESHES:
        seen, tensors = train_on(dp, mp)
        (folder / f"{dp}x{mp}.json").write_text(json.dumps(seen), encoding="utf-8")
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{dp}x{mp}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
