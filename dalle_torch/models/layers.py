"""One layer of the encoder and one of the decoder: attention and feed-forward parts, norms and residual sums.

Source: `FlaxBartEncoderLayer` and `FlaxBartDecoderLayer` in borisdayma/dalle-mini's `modeling.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dalle_torch.models.attention import Attention, CrossAttentionCache, SelfAttentionCache
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.feed_forward import FeedForward
from dalle_torch.models.norms import Side, final_residual_kind, make_norm, place_kind


def residual_scale(config: DalleBartConfig, side: Side) -> float:
    """Factor of the residual branch: 1, or DeepNet's alpha (arXiv 2203.00555, table 1)."""
    if not config.use_deepnet_scaling:
        return 1.0
    encoder, decoder = config.encoder_layers, config.decoder_layers
    return 0.81 * (encoder**4 * decoder) ** (1 / 16) if side == "encoder" else (3 * decoder) ** 0.25


def init_gain(config: DalleBartConfig, side: Side) -> float:
    """Factor of the initial standard deviation of value, output and feed-forward kernels.

    DeepNet's beta (arXiv 2203.00555, table 1), Sub-LN's gamma (arXiv 2210.06423, figure 2), else 1.
    """
    encoder, decoder = config.encoder_layers, config.decoder_layers
    if config.use_deepnet_scaling:
        return 0.87 * (encoder**4 * decoder) ** (-1 / 16) if side == "encoder" else (12 * decoder) ** -0.25
    if config.use_subln_init:
        gain = math.log(3 * decoder)
        return math.sqrt(gain * math.log(2 * encoder) / 3) if side == "encoder" else math.sqrt(gain)
    return 1.0


class _Layer(nn.Module):
    """What both kinds of layer share: normed, dropped-out sublayers added to a scaled residual branch.

    Whoever wants the layer's inputs alone to be kept for the backward pass sets the two attributes, as transformers
    does. Its own base class for this would do the same, but its module imports the whole compiler.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`compute`, all of it or, with gradient checkpointing, its result alone; hooks run once in either case."""
        if self.gradient_checkpointing and self.training:
            # torch_xla's function looks for the weights of a method's module.
            call = partial(self.compute, **kwargs) if kwargs else self.compute
            return self._gradient_checkpointing_func(call, *args)
        return self.compute(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the kind of layer is."""
        raise NotImplementedError

    def __init__(self, config: DalleBartConfig, side: Side, layer: int, layers: int) -> None:
        super().__init__()
        self.side = side
        self.residual_scale = residual_scale(config, side)
        self._add_attention(config, "self_attn", cross=False)
        if side == "decoder":
            self._add_attention(config, "cross_attn", cross=True)
        self.feed_forward = FeedForward(config, side)
        self.feed_forward_residual_norm = make_norm(config, final_residual_kind(config, layer, layers), config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self._set_init_gains(config)

    def _add_attention(self, config: DalleBartConfig, name: str, cross: bool) -> None:
        setattr(self, name, Attention(config, self.side, cross=cross))
        for place in ("pre", "post", "residual"):
            kind = place_kind(config, self.side, f"{name}_{place}")
            setattr(self, f"{name}_{place}_norm", make_norm(config, kind, config.d_model))

    def _set_init_gains(self, config: DalleBartConfig) -> None:
        gain = init_gain(config, self.side)
        scaled = [self.self_attn, *([self.cross_attn] if self.side == "decoder" and not config.use_subln_init else [])]
        linears = [projection for attention in scaled for projection in (attention.v_proj, attention.out_proj)]
        linears += [module for module in self.feed_forward.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            linear.init_gain = gain

    def _attention_sublayer(self, name: str, x: Tensor, **options: object) -> Tensor:
        pre, post, residual = (getattr(self, f"{name}_{place}_norm") for place in ("pre", "post", "residual"))
        attended = getattr(self, name)(x if pre is None else pre(x), **options)
        if post is not None:
            attended = post(attended)
        x = x * self.residual_scale + self.dropout(attended)
        return x if residual is None else residual(x)

    def _feed_forward_sublayer(self, x: Tensor) -> Tensor:
        x = x * self.residual_scale + self.feed_forward(x)
        return x if self.feed_forward_residual_norm is None else self.feed_forward_residual_norm(x)


class EncoderLayer(_Layer):
    """Self-attention, feed-forward: [B, S, d_model] -> [B, S, d_model]."""

    def __init__(self, config: DalleBartConfig, layer: int) -> None:
        super().__init__(config, "encoder", layer, config.encoder_layers)

    def compute(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool [B, 1, 1, S], True for real tokens."""
        return self._feed_forward_sublayer(self._attention_sublayer("self_attn", x, mask=mask))


class DecoderLayer(_Layer):
    """Causal self-attention, cross-attention, feed-forward: [B, S, d_model] -> [B, S, d_model]."""

    def __init__(self, config: DalleBartConfig, layer: int) -> None:
        super().__init__(config, "decoder", layer, config.decoder_layers)

    def compute(
        self,
        x: Tensor,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
        cross_cache: CrossAttentionCache | None = None,
        position: int | Tensor = 0,
    ) -> Tensor:
        """Either `encoder_states` [B, K, d_model] with `encoder_mask` [B, 1, 1, K], or both caches."""
        x = self._attention_sublayer("self_attn", x, cache=cache, position=position)
        x = self._attention_sublayer(
            "cross_attn", x, source=encoder_states, mask=encoder_mask, cross_cache=cross_cache, position=position
        )
        return self._feed_forward_sublayer(x)
