"""DalleBart: the text encoder, the image-token decoder, and the model of both.

Shapes: B rows, T text tokens, S image tokens. Owns: embeddings, stacks, loss. Does not own: loading (`loading`),
drawing (`generation`). Source: `DalleBart` in borisdayma/dalle-mini's `modeling.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput

from dalle_torch.models.attention import CrossAttentionCache, SelfAttentionCache
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.convert.formats import DALLE_BART_FORMATS
from dalle_torch.models.generation import ImageTokenGeneration
from dalle_torch.models.layers import DecoderLayer, EncoderLayer
from dalle_torch.models.linear import Linear
from dalle_torch.models.loading import CheckpointModel
from dalle_torch.models.norms import NORM_TYPES, LayerNorm, RMSNorm, final_norm_kind, make_norm


@dataclass
class DecoderCache:
    """What a decoder keeps between steps: one entry a layer in each list."""

    self_attention: list[SelfAttentionCache]
    cross_attention: list[CrossAttentionCache]


class _Stack(nn.Module):
    """Embeddings, layers and final norm, shared by encoder and decoder.

    Attributes:
        run_layers: called with the layers and what the first of them would be called with, in place of calling one
            after the other; None: they are.
    """

    layers: nn.ModuleList
    run_layers: Callable[..., Tensor] | None = None

    def __init__(self, config: DalleBartConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(vocabulary, config.d_model)
        self.embed_positions = nn.Embedding(length, config.d_model) if config.use_absolute_position_embeddings else None
        self.layernorm_embedding = NORM_TYPES[config.ln_type](config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor, position: int | Tensor = 0) -> Tensor:
        """Embed tokens [B, S] that stand at `position` and after: [B, S, d_model]."""
        return self.at_position(self.embed_tokens(ids) * self.embed_scale, position)

    def at_position(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Embedded tokens [B, S, d_model] with their positions, normed."""
        if self.embed_positions is not None:
            table = self.embed_positions.weight
            rows = table[position : position + x.shape[1]] if isinstance(position, int) else table[position]
            x = x + rows
        return self.dropout(self.layernorm_embedding(x))

    def through_layers(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """States after the last layer; each layer is given `context`, beside the states of the one before it."""
        if self.run_layers is not None:
            return self.run_layers(self.layers, x, *context)
        for layer in self.layers:
            x = layer(x, *context)
        return x


class DalleBartEncoder(_Stack):
    """Text tokens -> states, [B, T] -> [B, T, d_model]."""

    def __init__(self, config: DalleBartConfig) -> None:
        super().__init__(config, config.encoder_vocab_size, config.max_text_length)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))
        self.final_norm = make_norm(config, final_norm_kind(config, "encoder"), config.d_model)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool [B, 1, 1, T], True for real tokens.

        Raises:
            ValueError: more tokens than the model has positions for.
        """
        if input_ids.shape[1] > self.length:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, more than max_text_length={self.length}: truncate it"
            )
        x = self.through_layers(self.embed(input_ids), mask)
        return x if self.final_norm is None else self.final_norm(x)


class DalleBartDecoder(_Stack):
    """Image tokens and encoder states -> states, [B, S] -> [B, S, d_model]."""

    def __init__(self, config: DalleBartConfig) -> None:
        super().__init__(config, config.decoder_vocab_size, config.image_length)
        self.heads = config.decoder_attention_heads
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        self.final_norm = make_norm(config, final_norm_kind(config, "decoder"), config.d_model)

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        position: int | Tensor = 0,
    ) -> Tensor:
        """Either `encoder_states` [B, T, d_model] with `encoder_mask` [B, 1, 1, T], or `cache`.

        Args:
            position: of the first token; an int64 tensor of shape [1] gives steps of static shape (one token a step).

        Raises:
            ValueError: more tokens than a picture has.
        """
        if isinstance(position, int) and position + decoder_input_ids.shape[1] > self.length:
            raise ValueError(
                f"decoder_input_ids reach position {position + decoder_input_ids.shape[1]}, "
                f"but a picture has image_length={self.length} tokens"
            )
        x = self.embed(decoder_input_ids, position)
        if cache is None:
            x = self.through_layers(x, encoder_states, encoder_mask)
        else:
            for layer, own, cross in zip(self.layers, cache.self_attention, cache.cross_attention, strict=True):
                x = layer(x, cache=own, cross_cache=cross, position=position)
        return x if self.final_norm is None else self.final_norm(x)

    def make_cache(self, encoder_states: Tensor, encoder_mask: Tensor, pictures: int) -> DecoderCache:
        """Cross-attention keys and values of P prompts, and empty self-attention caches for P * `pictures` rows.

        Args:
            encoder_states: [P, T, d_model].
            encoder_mask: bool [P, 1, 1, T].
            pictures: drawn from each prompt.
        """
        prompts, _, width = encoder_states.shape
        shape = (prompts * pictures, self.heads, self.length, width // self.heads)
        cross = []
        for layer in self.layers:
            keys, values = layer.cross_attn.keys_values(encoder_states)
            cross.append(CrossAttentionCache(keys.contiguous(), values.contiguous(), encoder_mask))
        empty = [
            SelfAttentionCache(encoder_states.new_zeros(shape), encoder_states.new_zeros(shape)) for _ in self.layers
        ]
        return DecoderCache(empty, cross)


class DalleBart(ImageTokenGeneration, CheckpointModel):
    """Text tokens to image tokens: encoder, decoder and `lm_head`.

    Logits equal those of the original Flax model; every option of `DalleBartConfig` is built. Load with
    `from_pretrained`, draw with `generate`.
    """

    config: DalleBartConfig
    config_class = DalleBartConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    foreign_formats = DALLE_BART_FORMATS
    _no_split_modules = ("EncoderLayer", "DecoderLayer")
    _supports_sdpa = True

    def __init__(self, config: DalleBartConfig) -> None:
        super().__init__(config)
        self.encoder = DalleBartEncoder(config)
        self.decoder = DalleBartDecoder(config)
        self.lm_head = Linear(config.d_model, config.decoder_vocab_size, bias=False)
        self.post_init()
        if config.gradient_checkpointing:
            # What the public method of transformers does, which has one name up to version 5 and another one after it.
            self._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits of every image token given those before it.

        Args:
            input_ids: int64 [B, T], T at most `max_text_length`.
            attention_mask: [B, T], 1 for real tokens; None: all are.
            decoder_input_ids: int64 [B, S], the start token first; None: `labels` shifted right.
            labels: int64 [B, S], image tokens to be predicted.
            encoder_outputs: states [B, T, d_model] from an earlier call, to save the encoder's work.

        Returns:
            `.loss` (mean cross entropy over all image tokens, float32; None without labels),
            `.logits` [B, S, image_vocab_size + 1], `.encoder_last_hidden_state` [B, T, d_model].

        Raises:
            ValueError: neither `decoder_input_ids` nor `labels` given, or too many tokens.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("DalleBart needs decoder_input_ids or labels; to draw from a prompt use generate()")
            decoder_input_ids = self.shift_right(labels)
        mask = self.text_mask(input_ids, attention_mask)
        states = self.encoder(input_ids, mask) if encoder_outputs is None else encoder_outputs
        logits = self.lm_head(self.decoder(decoder_input_ids, states, mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=states)

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for `labels` [B, S]: the start token, then all labels but the last."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1]], dim=1)

    @staticmethod
    def text_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """bool [B, 1, 1, T] from the tokenizer's mask [B, T]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return attention_mask[:, None, None, :].bool()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std * getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif getattr(module, "head_scale", None) is not None:
            init.ones_(module.head_scale)
        elif isinstance(module, (LayerNorm, RMSNorm)):
            if module.weight is not None:
                init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
