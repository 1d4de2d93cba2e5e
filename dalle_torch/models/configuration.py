"""Configurations of the two networks, with the keys that the published checkpoints use.

Owns: names, defaults and the checks of every option, and of the files they come in. Does not own: what the options do
(`norms`, `attention`, `feed_forward`, `layers`, `vqgan`).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from dalle_torch.storage import CheckpointError

LayerNormPositions = Literal["normformer", "swinv2", "cogview", "postln", "deepnet", "preln", "subln"]
LayerNormType = Literal["layernorm", "rmsnorm"]
QuantizerType = Literal["vq", "gumbel"]

_VOCABULARY = 10_000_000
_DALLE_BART_SIZES = {
    "encoder_layers": 1000, "decoder_layers": 1000, "d_model": 65_536, "encoder_ffn_dim": 1 << 20,
    "decoder_ffn_dim": 1 << 20, "encoder_vocab_size": _VOCABULARY, "image_vocab_size": _VOCABULARY,
    "image_length": 65_536, "max_text_length": 65_536, "sinkhorn_iters": 1000,
}  # fmt: skip
_VQGAN_SIZES = {
    "ch": 65_536, "n_embed": _VOCABULARY, "embed_dim": 65_536, "z_channels": 65_536, "num_res_blocks": 100,
    "in_channels": 65_536, "out_ch": 65_536, "resolution": 65_536,
}  # fmt: skip
"""Far beyond any model; a file that asks for more is damaged, and would be found out only after minutes of building."""
_MAX_LEVELS, _MAX_MULTIPLIER = 16, 1024


def _size_problems(config: PreTrainedConfig, largest: Mapping[str, int]) -> list[str]:
    values = {name: getattr(config, name) for name in largest}
    return [f"{name}={value} must be at least 1" for name, value in values.items() if value < 1] + [
        f"{name}={value} must be at most {largest[name]}" for name, value in values.items() if value > largest[name]
    ]


@strict
class DalleBartConfig(PreTrainedConfig):
    """Everything that shapes a `DalleBart`; the keys are those of the `config.json` of DALL·E Mini and Mega.

    The defaults are those of DALL·E Mini's code (borisdayma/dalle-mini, `configuration.py`), which the published
    configurations rely on where they leave a key out.

    Raises:
        ValueError: an option is unknown, out of range, or contradicts another one; every offender is named.
    """

    model_type = "dallebart"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    }

    normalize_text: bool = False
    """Prompts go through `TextNormalizer` before they are tokenised."""
    encoder_vocab_size: int = 50264
    """Text tokens."""
    image_vocab_size: int = 16384
    """Image tokens; the decoder's embedding and `lm_head` have one row more, for the start token."""
    image_length: int = 256
    """Image tokens in a picture."""
    max_text_length: int = 64
    """Text tokens in a prompt; longer prompts are truncated."""
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    """Any name in transformers' `ACT2FN`, or "smelu"."""
    d_model: int = 1024
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    init_std: float | int = 0.02
    scale_embedding: bool = False
    """Token embeddings are multiplied by sqrt(d_model)."""
    gradient_checkpointing: bool = False
    use_cache: bool = True
    use_bias: bool = False
    """Biases in every attention and feed-forward projection."""
    use_glu: bool = False
    """Gated linear units (arXiv 2002.05202) instead of a plain feed-forward network."""
    ln_type: str = "layernorm"
    ln_positions: str = "normformer"
    """Where the norms of a layer stand; "deepnet" is another name for "postln"."""
    force_ln_scale: bool = False
    """Norms that a dense layer follows keep their scale."""
    use_final_ln_encoder: bool = True
    use_final_ln_decoder: bool = True
    use_head_scale: bool = False
    """A learnt factor for each attention head's output (NormFormer, arXiv 2110.09456)."""
    use_cosine_attention: bool = False
    """Cosine similarities divided by `tau_init` (Swin v2, arXiv 2111.09883)."""
    tau_init: float | int = 0.05
    use_absolute_position_embeddings: bool = True
    use_swin_position_embeddings: bool = False
    """A learnt table of relative positions for each attention is added to its scores."""
    use_deepnet_scaling: bool = False
    """Residual scaling and initialisation of DeepNet (arXiv 2203.00555)."""
    use_subln_init: bool = False
    """Initialisation of Sub-LN (arXiv 2210.06423)."""
    sinkhorn_iters: int = 1
    """More than one: doubly stochastic attention (Sinkformer, arXiv 2110.11773) in the encoder."""
    use_alibi: bool = False
    """Never built by the original; only `False` is accepted."""
    use_scan: bool = False
    """The checkpoint's layers are stacked on a leading axis; decides the last swinv2/postln norm too."""
    drawing_condition_scale: float | int = 10.0
    """Super conditioning that the pipeline draws with unless it is told otherwise; 10 is the original's."""
    drawing_temperature: float | int = 1.0
    """The temperature, likewise."""
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, self.image_vocab_size)
        super().__post_init__(**kwargs)
        problems = list(self._problems())
        if problems:
            raise ValueError("DalleBartConfig cannot be used: " + "; ".join(problems))

    @property
    def norm_layout(self) -> str:
        """`ln_positions` with its alias resolved."""
        return "postln" if self.ln_positions == "deepnet" else self.ln_positions

    @property
    def decoder_vocab_size(self) -> int:
        """Rows of the decoder's embedding and of `lm_head`: every image token and the start token."""
        return self.image_vocab_size + 1

    def _problems(self) -> list[str]:
        found = []
        for name, choices in (("ln_positions", LayerNormPositions), ("ln_type", LayerNormType)):
            if getattr(self, name) not in get_args(choices):
                found.append(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if self.activation_function != "smelu" and self.activation_function not in ACT2FN:
            found.append(
                f"activation_function={self.activation_function!r} is neither 'smelu' nor an activation of transformers"
            )
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if heads < 1 or self.d_model % heads:
                found.append(f"d_model={self.d_model} is not divisible by {side}_attention_heads={heads}")
        found += _size_problems(self, _DALLE_BART_SIZES)
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.init_std < math.inf:
            found.append(f"init_std={self.init_std} must be a finite number from 0 up")
        if not 0 < self.tau_init < math.inf:
            found.append(f"tau_init={self.tau_init} must be a finite number above 0")
        start = self.decoder_start_token_id
        if start is not None and not 0 <= start <= self.image_vocab_size:
            found.append(f"decoder_start_token_id={start} must be from 0 to image_vocab_size={self.image_vocab_size}")
        if self.use_alibi:
            found.append("use_alibi=True was never built; set it to false")
        if self.norm_layout == "swinv2" and self.use_scan:
            found.append("ln_positions='swinv2' has layers that differ and cannot be stacked: set use_scan to false")
        return found


@strict
class VQGANConfig(PreTrainedConfig):
    """Everything that shapes a `VQGAN`: the keys of taming-transformers' `ddconfig` and of the hub's Flax VQGAN.

    Raises:
        ValueError: an option is unknown or out of range; every offender is named.
    """

    model_type = "vqgan"

    ch: int = 128
    """Channels of the first level; a multiple of 32, for GroupNorm."""
    out_ch: int = 3
    in_channels: int = 3
    num_res_blocks: int = 2
    resolution: int = 256
    """Pixels of a square picture's side."""
    z_channels: int = 256
    ch_mult: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multipliers, one a level; each level but the last halves the resolution."""
    attn_resolutions: list[int] | tuple[int, ...] = (16,)
    n_embed: int = 16384
    """Entries of the codebook."""
    embed_dim: int = 256
    dropout: float | int = 0.0
    double_z: bool = False
    resamp_with_conv: bool = True
    give_pre_end: bool = False
    norm_groups: int = 32
    """Groups of every GroupNorm; all published networks have 32. With one channel a group, which 32 is for `ch` of 32,
    a norm erases each channel's mean and with it the colours, so small networks want fewer."""
    quantizer: str = "vq"
    kl_weight: float | int = 1e-8
    """Weight of the prior in the Gumbel quantizer's training loss."""
    pixel_range: list[float | int] | tuple[float | int, float | int] = (-1.0, 1.0)
    """What the network calls black and white: (-1, 1) in taming's checkpoints, (0, 1) in the hub's of DALL·E Mini."""

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.ch_mult = tuple(self.ch_mult)
        self.attn_resolutions = tuple(self.attn_resolutions)
        if len(self.pixel_range) == 2:
            self.pixel_range = (float(self.pixel_range[0]), float(self.pixel_range[1]))
        problems = list(self._problems())
        if problems:
            raise ValueError("VQGANConfig cannot be used: " + "; ".join(problems))

    @property
    def latent_size(self) -> int:
        """Side of the square grid of codes."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)

    @property
    def image_length(self) -> int:
        """Codes in a picture."""
        return self.latent_size**2

    def _problems(self) -> list[str]:
        found = []
        if self.quantizer not in get_args(QuantizerType):
            found.append(f"quantizer={self.quantizer!r} is not one of {', '.join(get_args(QuantizerType))}")
        if len(self.ch_mult) > _MAX_LEVELS:
            found.append(f"ch_mult has {len(self.ch_mult)} levels, and must have at most {_MAX_LEVELS}")
        elif not self.ch_mult or not 1 <= min(self.ch_mult) <= max(self.ch_mult) <= _MAX_MULTIPLIER:
            found.append(f"ch_mult={self.ch_mult} needs at least one level, each of 1 to {_MAX_MULTIPLIER}")
        elif self.resolution % 2 ** (len(self.ch_mult) - 1):
            found.append(f"resolution={self.resolution} is not divisible by {2 ** (len(self.ch_mult) - 1)}")
        if self.norm_groups < 1 or 32 % self.norm_groups:
            found.append(f"norm_groups={self.norm_groups} must divide 32")
        if self.ch < 1 or self.ch % 32:
            found.append(f"ch={self.ch} is not a positive multiple of 32")
        found += _size_problems(self, _VQGAN_SIZES)
        if self.double_z:
            found.append("double_z=True belongs to a KL autoencoder, not to a VQGAN")
        if len(self.pixel_range) != 2 or not -math.inf < self.pixel_range[0] < self.pixel_range[1] < math.inf:
            found.append(f"pixel_range={self.pixel_range} must be (black, white) with black < white")
        return found


@contextmanager
def told_of(source: str | os.PathLike[str]) -> Iterator[None]:
    """While a configuration is made from what is written in `source`: its errors are the file's, not ours.

    Raises:
        CheckpointError: an option is of the wrong type, unknown, out of range, or contradicts another one.
    """
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: its configuration cannot be used: {reason[:1000]}") from error


def check_config_file(
    path: Path, source: str | os.PathLike[str], config_class: type[PreTrainedConfig], model_name: str
) -> None:
    """Refuse the configuration of another type of model; `architectures` tells nothing in the published ones.

    Raises:
        CheckpointError: the file is not JSON, or is that of another model than `model_name`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: config.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: config.json holds no object of options")
    expected = config_class.model_type
    found = values.get("model_type")
    if found is not None and found != expected:
        raise CheckpointError(f"{source} holds a model of type {found!r}, but {model_name} loads {expected!r}")
    strangers = [key for key in values if key not in config_class.__dataclass_fields__]
    if found is None and 2 * len(strangers) > len(values):
        raise CheckpointError(
            f"{source}: config.json names no model_type, and its keys ({', '.join(strangers[:6])}, ...) are not "
            f"those of {expected!r}, which {model_name} loads"
        )
