"""Multi-head attention with every option of the original, and the fixed-size caches that decoding uses.

Shapes: B rows, S queries, K keys, H heads, D = d_model / H, P prompts, N pictures a prompt.
Owns: projections, scores, masks, caches. Does not own: norms around it (`layers`), dropout of its output.
Source: `FlaxBartAttention` in borisdayma/dalle-mini's `modeling.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.linear import Linear
from dalle_torch.models.norms import Side, make_norm, place_kind

COSINE_EPSILON = 1e-8


@dataclass
class SelfAttentionCache:
    """Keys and values of the tokens drawn so far, one layer: both [B, H, image_length, D], written in place."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, position: int | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write [B, H, S, D] from `position` on; return keys, values and mask (None: nothing to hide) to attend to.

        An integer position returns just the part that is filled, which saves work where shapes are free. A tensor
        position (shape [1], S = 1) returns the whole cache under a mask, so that every step has the same shapes.
        """
        if isinstance(position, Tensor):
            self.keys.index_copy_(2, position, keys)
            self.values.index_copy_(2, position, values)
            mask = torch.arange(self.keys.shape[2], device=keys.device) <= position
            return self.keys, self.values, mask.view(1, 1, 1, -1)
        end = position + keys.shape[2]
        self.keys[:, :, position:end] = keys
        self.values[:, :, position:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end], None


@dataclass
class CrossAttentionCache:
    """Keys and values of the prompts, one layer: both [P, H, K, D]; `mask` is bool [P, 1, 1, K].

    The N pictures of a prompt share them: decoder rows are [P * N] with the pictures of a prompt side by side.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


class Attention(nn.Module):
    """One attention of the encoder or decoder.

    Args:
        config: options of the model.
        side: whose layer this is; decides heads, causality and Sinkhorn.
        cross: whether keys and values come from the encoder.

    Attributes:
        product: [B, H, S, D] times [B, H, D, K]; set by who lays heads over several devices. None: torch's attention,
            with its fast kernels, wherever that can be.
    """

    product: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: DalleBartConfig, side: Side, cross: bool = False) -> None:
        super().__init__()
        width = config.d_model
        self.heads = config.encoder_attention_heads if side == "encoder" else config.decoder_attention_heads
        self.causal = side == "decoder" and not cross
        self.sinkhorn_iters = config.sinkhorn_iters if side == "encoder" else 1
        self.cosine = config.use_cosine_attention
        self.scale = 1 / config.tau_init if self.cosine else 1 / math.sqrt(width // self.heads)
        self.dropout = config.attention_dropout
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(width, width, bias=config.use_bias))
        self.head_scale = nn.Parameter(torch.ones(self.heads)) if config.use_head_scale else None
        mid = None if cross else place_kind(config, side, "self_attn_mid")
        self.mid_norm = make_norm(config, mid, width)
        self.position_bias = None
        if config.use_swin_position_embeddings:
            queries = config.image_length if side == "decoder" else config.max_text_length
            keys = config.max_text_length if cross or side == "encoder" else config.image_length
            self.position_bias = nn.Embedding(queries, keys * self.heads)

    def forward(
        self,
        hidden: Tensor,
        *,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
        cross_cache: CrossAttentionCache | None = None,
        position: int | Tensor = 0,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: queries, [B, S, d_model].
            source: where keys and values come from, [B, K, d_model]; None: `hidden`.
            mask: bool, broadcastable to [B, H, S, K]; True may be attended to.
            cache: self-attention cache, for decoding from `position` on.
            cross_cache: keys and values of the prompts; `source` and `mask` are then not used.
            position: of the first query; int, or int64 tensor [1] for steps of static shape.

        Returns:
            [B, S, d_model].
        """
        queries = self._heads(self.q_proj(hidden))
        if self.cosine:
            queries = _unit(queries)
        if cross_cache is not None:
            return self._attend_to_prompts(queries, cross_cache, position)
        keys, values = self.keys_values(hidden if source is None else source)
        causal = self.causal and hidden.shape[1] > 1
        if cache is not None:
            keys, values, mask = cache.update(keys, values, position)
            if causal and keys.shape[2] != hidden.shape[1]:
                mask = _causal_mask(hidden.shape[1], keys.shape[2], hidden.device)
                causal = False
        bias = self._bias(position, hidden.shape[1], keys.shape[2])
        return self._project(self._attend(queries, keys, values, mask, bias, causal))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, H, K, D], of `source` [B, K, d_model]."""
        keys = self._heads(self.k_proj(source))
        return (_unit(keys) if self.cosine else keys), self._heads(self.v_proj(source))

    def _attend_to_prompts(self, queries: Tensor, cache: CrossAttentionCache, position: int | Tensor) -> Tensor:
        prompts, steps = cache.keys.shape[0], queries.shape[2]
        # The pictures of a prompt become queries of one row, so its keys and values are read once for all of them.
        grouped = rearrange(queries, "(p n) h s d -> p h (n s) d", p=prompts)
        bias = self._bias(position, steps, cache.keys.shape[2])
        if bias is not None:
            bias = bias.repeat(1, grouped.shape[2] // steps, 1)
        attended = self._attend(grouped, cache.keys, cache.values, cache.mask, bias, causal=False)
        return self._project(rearrange(attended, "p h (n s) d -> (p n) h s d", s=steps))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _project(self, attended: Tensor) -> Tensor:
        if self.head_scale is not None:
            attended = attended * self.head_scale.view(-1, 1, 1)
        merged = attended.transpose(1, 2).flatten(2)
        return self.out_proj(merged if self.mid_norm is None else self.mid_norm(merged))

    def _bias(self, position: int | Tensor, queries: int, keys: int) -> Tensor | None:
        """Learnt relative positions [H, queries, keys] for the rows from `position` on."""
        if self.position_bias is None:
            return None
        table = self.position_bias.weight
        rows = table[position : position + queries] if isinstance(position, int) else table[position]
        return rearrange(rows, "q (k h) -> h q k", h=self.heads)[:, :, :keys]

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        drop = self.dropout if self.training else 0.0
        if self.sinkhorn_iters > 1 or drop > 0 or self.product is not None:
            return self._attend_explicitly(queries, keys, values, mask, bias, causal, drop)
        if bias is None:
            # One query sees all of the cache; SDPA's own causal flag serves the rest and keeps its fast kernels.
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, scale=self.scale
            )
        scores_bias = _additive(bias, mask, causal, queries, keys)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=scores_bias, scale=self.scale)

    def _attend_explicitly(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        drop: float,
    ) -> Tensor:
        product = torch.matmul if self.product is None else self.product
        scores = product(queries, keys.transpose(-1, -2)) * self.scale
        if bias is not None:
            scores = scores + bias
        hidden_keys = None if mask is None else ~mask
        if causal:
            future = ~_causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
            hidden_keys = future if hidden_keys is None else hidden_keys | future
        if self.sinkhorn_iters > 1:
            weights = sinkhorn(scores, hidden_keys, self.sinkhorn_iters)
        else:
            if hidden_keys is not None:
                scores = scores.masked_fill(hidden_keys, -torch.inf)
            weights = scores.softmax(dim=-1)
        if drop > 0:
            # One mask for all rows and heads, as in Flax's `broadcast_dropout`.
            weights = weights * F.dropout(weights.new_ones(weights.shape[-2:]), drop)
        return product(weights, values)


def sinkhorn(scores: Tensor, hidden_keys: Tensor | None, iterations: int) -> Tensor:
    """Attention weights normalised over keys and queries in turn (Sinkformer, arXiv 2110.11773), in log space.

    Args:
        scores: [B, H, S, K].
        hidden_keys: bool, broadcastable to `scores`; True gets weight 0 and takes no part in any sum.
        iterations: normalisations in all; the first is over keys.

    Returns:
        Weights, [B, H, S, K].
    """
    # A finite floor, since the log-sum-exp of a column of -inf would give NaN, and its gradient too.
    floor = torch.finfo(scores.dtype).min / 2
    for iteration in range(iterations):
        if hidden_keys is not None:
            scores = scores.masked_fill(hidden_keys, floor)
        scores = scores - scores.logsumexp(dim=-1 if iteration % 2 == 0 else -2, keepdim=True)
    weights = scores.exp()
    return weights if hidden_keys is None else weights.masked_fill(hidden_keys, 0)


def _unit(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + COSINE_EPSILON)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: the last query sees every key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _additive(bias: Tensor, mask: Tensor | None, causal: bool, queries: Tensor, keys: Tensor) -> Tensor:
    scores_bias = bias.to(queries.dtype).unsqueeze(0)
    if causal:
        visible = _causal_mask(queries.shape[2], keys.shape[2], queries.device)
        mask = visible if mask is None else mask & visible
    return scores_bias if mask is None else scores_bias.masked_fill(~mask, -torch.inf)
