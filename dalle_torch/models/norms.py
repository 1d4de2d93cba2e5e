"""Norms, and the table of where each `ln_positions` puts them.

Owns: which norm stands at which place of a layer and whether it has a scale. Does not own: the layers themselves.
The places were compared in the original's training reports: NormFormer (arXiv 2110.09456), Swin v2 (2111.09883),
Sandwich-LN of CogView (2105.13290), post-LN and DeepNet (2203.00555), pre-LN, Sub-LN (2210.06423).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_torch.models.configuration import DalleBartConfig

EPSILON = 1e-5

Side = Literal["encoder", "decoder"]
Kind = Literal["full", "bare"]
"""full: scale and bias (RMSNorm: scale). bare: bias only (RMSNorm: no parameter), since a dense layer follows."""

_PRE = frozenset({"normformer", "cogview", "preln"})
_POST = frozenset({"normformer", "swinv2", "cogview"})
_RESIDUAL = frozenset({"postln"})
_SUBLN = frozenset({"subln"})

_FEED_FORWARD: dict[str, tuple[frozenset[str], Kind]] = {
    "feed_forward_pre": (_PRE | _SUBLN, "bare"),
    "feed_forward_mid": (frozenset({"normformer", "subln"}), "bare"),
    "feed_forward_post": (frozenset({"swinv2", "cogview"}), "full"),
}
PLACES: dict[Side, dict[str, tuple[frozenset[str], Kind]]] = {
    "encoder": {
        "self_attn_pre": (_PRE | _SUBLN, "bare"),
        "self_attn_mid": (_SUBLN, "full"),
        "self_attn_post": (_POST, "full"),
        "self_attn_residual": (_RESIDUAL, "full"),
        **_FEED_FORWARD,
    },
    "decoder": {
        "self_attn_pre": (_PRE, "bare"),
        "self_attn_mid": (_SUBLN, "full"),
        "self_attn_post": (_POST, "full"),
        "self_attn_residual": (_RESIDUAL, "full"),
        "cross_attn_pre": (_PRE, "bare"),
        "cross_attn_post": (_POST, "full"),
        "cross_attn_residual": (_RESIDUAL, "full"),
        **_FEED_FORWARD,
    },
}
"""side -> place -> (the layouts that have a norm there, its kind)."""

SWIN_EXTRA_NORM_EVERY = 6
"""Swin v2 adds a norm on the main branch after every sixth layer."""


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with an optional scale; statistics in float32.

    Args:
        features: size of the last dimension.
        scale: whether there is a learnt scale beside the bias.
    """

    def __init__(self, features: int, scale: bool = True) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(features)) if scale else None
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be of another dtype; torch's CPU backward takes that only where there is a scale too.
        bias = self.bias.to(x.dtype) if self.weight is None else self.bias
        return F.layer_norm(x, (self.features,), self.weight, bias, EPSILON)

    def extra_repr(self) -> str:
        return f"{self.features}, scale={self.weight is not None}"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467), with an optional scale; statistics in float32."""

    def __init__(self, features: int, scale: bool = True) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(features)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.features,), self.weight, EPSILON)

    def extra_repr(self) -> str:
        return f"{self.features}, scale={self.weight is not None}"


NORM_TYPES: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def make_norm(config: DalleBartConfig, kind: Kind | None, features: int) -> nn.Module | None:
    """The norm of `config` for one place, or None where the layout has none."""
    if kind is None:
        return None
    return NORM_TYPES[config.ln_type](features, scale=kind == "full" or config.force_ln_scale)


def place_kind(config: DalleBartConfig, side: Side, place: str) -> Kind | None:
    """The kind of norm that `config` has at `place` of each layer of `side`, or None."""
    layouts, kind = PLACES[side][place]
    return kind if config.norm_layout in layouts else None


def final_residual_kind(config: DalleBartConfig, layer: int, layers: int) -> Kind | None:
    """The kind of norm after the last residual sum of layer number `layer` (from 0) out of `layers`, or None."""
    last = layer == layers - 1
    if config.norm_layout == "postln":
        return "bare" if last and not config.use_scan else "full"
    if config.norm_layout == "swinv2" and (layer + 1) % SWIN_EXTRA_NORM_EVERY == 0 and not last:
        return "full"
    return None


def final_norm_kind(config: DalleBartConfig, side: Side) -> Kind | None:
    """The kind of norm after the last layer of `side`, or None."""
    wanted = config.use_final_ln_encoder if side == "encoder" else config.use_final_ln_decoder
    return "bare" if wanted and config.norm_layout != "postln" else None
