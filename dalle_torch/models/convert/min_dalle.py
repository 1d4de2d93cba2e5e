"""The weights that min-dalle publishes (`encoder.pt`, `decoder.pt`, `detoker.pt`; kuprel/min-dalle on GitHub).

Owns: their names in our terms, and the configuration of the two published sizes. Does not own: the question whether a
pickle may be read (`models.loading` asks it first).
min-dalle pads prompts with text token 1 and masks it; its own loop begins a picture with token 16383, while the model
was trained with 16384, which is what the configuration here says.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
from dalle_torch.storage import CheckpointError

_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^final_ln\.", "final_norm."),
    (r"^(layers\.\d+\.)pre_self_attn_layer_norm\.", r"\1self_attn_pre_norm."),
    (r"^(layers\.\d+\.)self_attn_layer_norm\.", r"\1self_attn_post_norm."),
    (r"^(layers\.\d+\.)pre_encoder_attn_layer_norm\.", r"\1cross_attn_pre_norm."),
    (r"^(layers\.\d+\.)encoder_attn_layer_norm\.", r"\1cross_attn_post_norm."),
    (r"^(layers\.\d+\.)encoder_attn\.", r"\1cross_attn."),
    (r"^(layers\.\d+\.)glu\.ln0\.", r"\1feed_forward.pre_norm."),
    (r"^(layers\.\d+\.)glu\.ln1\.", r"\1feed_forward.mid_norm."),
    (r"^(layers\.\d+\.)glu\.fc0\.", r"\1feed_forward.gate_proj."),
    (r"^(layers\.\d+\.)glu\.fc1\.", r"\1feed_forward.up_proj."),
    (r"^(layers\.\d+\.)glu\.fc2\.", r"\1feed_forward.down_proj."),
)

_HEADS = {(1024, 12): 16, (2048, 24): 32}
"""(d_model, layers) of the published sizes, Mini and Mega -> heads, which no shape tells."""

DETOKER_NAME = "detoker.pt"

IMAGE_CODES = 2**14
"""Codes of the VQGAN; the start token comes right after them."""


def read_min_dalle(folder: Path, config: DalleBartConfig, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of `encoder.pt` and `decoder.pt` (with `suffix`, `encoder_mini.pt` and so on).

    Raises:
        CheckpointError: a file is damaged, or holds more than tensors.
    """
    for side in ("encoder", "decoder"):
        for name, tensor in read_pickled_tensors(folder / f"{side}{suffix}.pt").items():
            ours = name
            for pattern, replacement in _RENAMED:
                ours = re.sub(pattern, replacement, ours)
            yield (ours if ours.startswith("lm_head.") else f"{side}.{ours}"), tensor


def min_dalle_config(folder: Path, suffix: str = "") -> DalleBartConfig:
    """The configuration of a published size, from the shapes of its weights.

    Raises:
        CheckpointError: the sizes are not those of Mini or Mega, or the files are not min-dalle's.
    """
    encoder, decoder = (read_pickled_tensors(folder / f"{side}{suffix}.pt") for side in ("encoder", "decoder"))
    try:
        text_vocab, width = encoder["embed_tokens.weight"].shape
        rows = decoder["embed_tokens.weight"].shape[0]
        inner = [side["layers.0.glu.fc0.weight"].shape[0] for side in (encoder, decoder)]
        lengths = [side["embed_positions.weight"].shape[0] for side in (encoder, decoder)]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder} holds no min-dalle weights: {error} is missing or misshapen") from error
    layers = [_count_layers(side) for side in (encoder, decoder)]
    heads = _HEADS.get((width, layers[0])) if layers[0] == layers[1] else None
    if heads is None:
        raise CheckpointError(
            f"{folder} holds {layers[0]} + {layers[1]} layers of width {width}, which is neither DALL·E Mini nor Mega, "
            "and the number of heads cannot be told from weights: pass config=DalleBartConfig(...), or write a folder "
            "that has a configuration by dalle-torch convert SOURCE DEST --config FILE"
        )
    # Mega has unused rows after the codes, and uses the second of them where the start token takes the first.
    special = IMAGE_CODES + 1 if rows - 1 > IMAGE_CODES else None
    return DalleBartConfig(
        encoder_vocab_size=text_vocab, image_vocab_size=rows - 1, d_model=width,
        max_text_length=lengths[0], image_length=lengths[1],
        encoder_layers=layers[0], decoder_layers=layers[1],
        encoder_ffn_dim=inner[0], decoder_ffn_dim=inner[1],
        encoder_attention_heads=heads, decoder_attention_heads=heads,
        use_glu=True, ln_positions="normformer", ln_type="layernorm", activation_function="gelu",
        normalize_text=True, dropout=0.0,
        bos_token_id=special, pad_token_id=special, eos_token_id=special,
        decoder_start_token_id=IMAGE_CODES,
    )  # fmt: skip


def read_detoker(folder: Path, config: VQGANConfig) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of `detoker.pt`: codebook and decoder of the VQGAN, under our names.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    for name, tensor in read_pickled_tensors(folder / DETOKER_NAME).items():
        yield f"quantize.{name}" if name.startswith("embedding.") else name, tensor


def detoker_config(folder: Path) -> VQGANConfig:
    """The configuration of min-dalle's VQGAN, the one published for DALL·E Mini; its pixels are in [0, 1]."""
    return VQGANConfig(pixel_range=(0.0, 1.0))


def read_pickled_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.pt` file, mapped where the file allows it, by torch's restricted unpickler.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors by name.
    """
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is not a file of tensors, or is damaged: {reason[:200]}") from error
    if not isinstance(held, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in held.items()
    ):
        raise CheckpointError(f"{path} holds something else than tensors by name")
    return held


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d{1,4})\.", name))]
    return max(numbers, default=-1) + 1
