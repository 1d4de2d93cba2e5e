"""The original DALL·E Mini checkpoints: names and layout of the Flax tree, turned into ours.

Owns: the table of Flax names for every configuration, stacked layers included. Does not own: reading the file
(`msgpack`), the check that everything fits (`models.weights`).
Source: `FlaxDalleBart` in borisdayma/dalle-mini's `modeling.py`. Flax numbers the unnamed modules of a module in the
order of their calls, so a norm that a layout lacks takes no number, while one without parameters does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from torch import Tensor

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.convert.msgpack import read_tensors
from dalle_torch.models.norms import Kind, Side, final_norm_kind, final_residual_kind, place_kind
from dalle_torch.storage import CheckpointError

FLAX_WEIGHTS_NAME = "flax_model.msgpack"

Form = Literal["plain", "kernel", "head_scale"]

_NORM_CLASSES = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_STACKS = {"encoder": "FlaxBartEncoderLayers", "decoder": "FlaxBartDecoderLayers"}


@dataclass(frozen=True)
class FlaxEntry:
    """Where a parameter of ours stands in the Flax tree."""

    path: str
    """Names from the root down, joined by "/"."""
    form: Form = "plain"
    """kernel: stored [in, out]; head_scale: stored [1, 1, heads, 1]."""
    layer: int | None = None
    """Place on the leading axis where the layers are stacked."""

    def to_ours(self, stored: Tensor) -> Tensor:
        """Our parameter, as a view of the stored tensor; a tensor of unforeseen shape stays as it is."""
        tensor = stored if self.layer is None else stored[self.layer]
        if self.form == "kernel" and tensor.dim() == 2:
            return tensor.T
        if self.form == "head_scale" and tensor.dim() == 4 and tensor.numel() == tensor.shape[2]:
            return tensor.reshape(-1)
        return tensor


def flax_entries(config: DalleBartConfig, stacked: bool | None = None) -> dict[str, FlaxEntry]:
    """Our name of every parameter of a model with `config` -> its place in the Flax tree.

    Args:
        config: of the model.
        stacked: whether the tree has its layers on a leading axis; by default as `config.use_scan` says.
    """
    stacked = config.use_scan if stacked is None else stacked
    entries = {"lm_head.weight": FlaxEntry("lm_head/kernel", "kernel")}
    for side in ("encoder", "decoder"):
        root = f"model/{side}"
        tables = ("embed_tokens", "embed_positions") if config.use_absolute_position_embeddings else ("embed_tokens",)
        entries |= {f"{side}.{table}.weight": FlaxEntry(f"{root}/{table}/embedding") for table in tables}
        for ours, theirs, kind in (
            ("layernorm_embedding", "layernorm_embedding", "full"),
            ("final_norm", "final_ln", final_norm_kind(config, side)),
        ):
            entries |= dict(_norm(config, f"{side}.{ours}", f"{root}/{theirs}", kind))
        layers = config.encoder_layers if side == "encoder" else config.decoder_layers
        for i in range(layers):
            where = _STACKS[side] if stacked else f"{_STACKS[side].removesuffix('s')}_{i}"
            for name, entry in _layer(config, side, i, layers):
                path = f"{root}/layers/{where}/{entry.path}"
                entries[f"{side}.layers.{i}.{name}"] = replace(entry, path=path, layer=i if stacked else None)
    return entries


def read_flax_dallebart(folder: Path, config: DalleBartConfig) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of `folder/flax_model.msgpack` under our names, layers stacked or not.

    Yields:
        (our name, view on the mapped file in our layout); an entry without a place in the model under its Flax path.

    Raises:
        CheckpointError: the file is damaged, or stacks another number of layers than `config` has.
    """
    path = folder / FLAX_WEIGHTS_NAME
    places: dict[str, list[tuple[str, FlaxEntry]]] = {}
    tables = [flax_entries(config, stacked=False), flax_entries(config, stacked=True)]
    for name, entry in dict.fromkeys(item for table in tables for item in table.items()):
        places.setdefault(entry.path, []).append((name, entry))
    for names, tensor in read_tensors(path):
        where = "/".join(names[1:] if names[0] == "params" else names)
        targets = places.get(where)
        if targets is None:
            yield where, tensor
            continue
        depth = tensor.shape[0] if tensor.dim() else 0
        if targets[0][1].layer is not None and depth != len(targets):
            raise CheckpointError(f"{path} stacks {depth} layers in {where}, but the configuration has {len(targets)}")
        for name, entry in targets:
            yield name, entry.to_ours(tensor)


def _layer(config: DalleBartConfig, side: Side, layer: int, layers: int) -> Iterator[tuple[str, FlaxEntry]]:
    """Parameters of one layer, with paths that begin in it."""
    numbers = count()
    for i, attention in enumerate(("self_attn", "cross_attn") if side == "decoder" else ("self_attn",)):
        yield from _attention(config, side, attention, f"FlaxBartAttention_{i}")
        for place in ("pre", "post", "residual"):
            kind = place_kind(config, side, f"{attention}_{place}")
            yield from _numbered_norm(config, f"{attention}_{place}_norm", "", kind, numbers)
    yield from _feed_forward(config, side)
    kind = final_residual_kind(config, layer, layers)
    yield from _numbered_norm(config, "feed_forward_residual_norm", "", kind, numbers)


def _attention(config: DalleBartConfig, side: Side, ours: str, theirs: str) -> Iterator[tuple[str, FlaxEntry]]:
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _dense(config, f"{ours}.{projection}", f"{theirs}/{projection}")
    if config.use_head_scale:
        yield f"{ours}.head_scale", FlaxEntry(f"{theirs}/head_scale", "head_scale")
    if config.use_swin_position_embeddings:
        yield f"{ours}.position_bias.weight", FlaxEntry(f"{theirs}/rel_bias/embedding")
    if ours == "self_attn":
        kind = place_kind(config, side, "self_attn_mid")
        yield from _norm(config, f"{ours}.mid_norm", f"{theirs}/mid_layernorm", kind)


def _feed_forward(config: DalleBartConfig, side: Side) -> Iterator[tuple[str, FlaxEntry]]:
    theirs = "GLU_0" if config.use_glu else "FFN_0"
    for i, ours in enumerate(("gate_proj", "up_proj", "down_proj") if config.use_glu else ("up_proj", "down_proj")):
        yield from _dense(config, f"feed_forward.{ours}", f"{theirs}/Dense_{i}")
    numbers = count()
    for place in ("pre", "mid", "post"):
        kind = place_kind(config, side, f"feed_forward_{place}")
        yield from _numbered_norm(config, f"feed_forward.{place}_norm", f"{theirs}/", kind, numbers)


def _dense(config: DalleBartConfig, ours: str, theirs: str) -> Iterator[tuple[str, FlaxEntry]]:
    yield f"{ours}.weight", FlaxEntry(f"{theirs}/kernel", "kernel")
    if config.use_bias:
        yield f"{ours}.bias", FlaxEntry(f"{theirs}/bias")


def _numbered_norm(
    config: DalleBartConfig, ours: str, prefix: str, kind: Kind | None, numbers: Iterator[int]
) -> Iterator[tuple[str, FlaxEntry]]:
    if kind is not None:
        yield from _norm(config, ours, f"{prefix}{_NORM_CLASSES[config.ln_type]}_{next(numbers)}", kind)


def _norm(config: DalleBartConfig, ours: str, theirs: str, kind: Kind | None) -> Iterator[tuple[str, FlaxEntry]]:
    if kind is None:
        return
    if kind == "full" or config.force_ln_scale:
        yield f"{ours}.weight", FlaxEntry(f"{theirs}/scale")
    if config.ln_type == "layernorm":
        yield f"{ours}.bias", FlaxEntry(f"{theirs}/bias")
