"""The feed-forward part of a layer: gated (GLU) or plain (FFN).

Source: `GLU` and `FFN` in borisdayma/dalle-mini's `modeling.py`; gated units: arXiv 2002.05202; SmeLU: 2202.06499.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.linear import Linear
from dalle_torch.models.norms import Side, make_norm, place_kind


class SmeLU(nn.Module):
    """SmeLU with half-width 1 as the original computes it: x above 1, (x + 1)^2 / 4 between, 1/4 up to -1; slope 1.

    The paper's function (arXiv 2202.06499) is 0 up to -1 and has its own slope. The original sets such inputs to 0
    before it takes the square, and passes gradients straight through. Weights trained with it expect that value, and
    reproducing its training needs that slope.
    """

    def forward(self, x: Tensor) -> Tensor:
        value = torch.where(x <= -1, 0.25, (x.clamp(-1, 1) + 1).square() / 4 + (x - 1).clamp_min(0))
        return value.detach() + (x - x.detach())


def make_activation(name: str) -> nn.Module:
    """The activation called `name`: "smelu" or any of transformers'."""
    return SmeLU() if name == "smelu" else ACT2FN[name]


class FeedForward(nn.Module):
    """down(dropout(mid_norm(act(gate(x)) * up(x)))) for GLU, down(dropout(mid_norm(act(up(x))))) for FFN.

    [B, S, d_model] -> [B, S, d_model], with a norm before, in the middle and after, as the layout has them.
    """

    def __init__(self, config: DalleBartConfig, side: Side) -> None:
        super().__init__()
        width = config.d_model
        inner = config.encoder_ffn_dim if side == "encoder" else config.decoder_ffn_dim
        self.pre_norm = make_norm(config, place_kind(config, side, "feed_forward_pre"), width)
        self.gate_proj = Linear(width, inner, bias=config.use_bias) if config.use_glu else None
        self.up_proj = Linear(width, inner, bias=config.use_bias)
        self.mid_norm = make_norm(config, place_kind(config, side, "feed_forward_mid"), inner)
        self.down_proj = Linear(inner, width, bias=config.use_bias)
        self.post_norm = make_norm(config, place_kind(config, side, "feed_forward_post"), width)
        self.activation = make_activation(config.activation_function)
        self.inner_dropout = nn.Dropout(config.activation_dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        inner = self.up_proj(x)
        inner = self.activation(inner) if self.gate_proj is None else self.activation(self.gate_proj(x)) * inner
        if self.mid_norm is not None:
            inner = self.mid_norm(inner)
        x = self.down_proj(self.inner_dropout(inner))
        if self.post_norm is not None:
            x = self.post_norm(x)
        return self.dropout(x)
