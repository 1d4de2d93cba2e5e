"""A whole model with random weights that draws 16 x 16 pixels in milliseconds: pipeline, folder and parts."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dalle_torch import VQGAN, DalleBart, DalleBartConfig, DallePipeline, VQGANConfig
from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer

CODES_A_SIDE = 4
CODEBOOK = 20
SPECIAL_TOKENS = 3
"""Image tokens that are no codes, as DALL·E Mega has them."""


def tiny_pipeline(**config: Any) -> DallePipeline:
    """Random weights, always the same; `config` replaces options of the DalleBart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DallePipeline(tiny_model(**config), tiny_processor(), tiny_vqgan())


def tiny_model(**config: Any) -> DalleBart:
    options = {
        "encoder_vocab_size": 300,
        "image_vocab_size": CODEBOOK + SPECIAL_TOKENS,
        "image_length": CODES_A_SIDE**2,
        "max_text_length": 12,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "use_glu": True,
        # Wide enough for prompts and earlier tokens to tell in what is drawn.
        "init_std": 0.3,
    }
    return DalleBart(DalleBartConfig(**options | config)).eval()


def tiny_vqgan(**config: Any) -> VQGAN:
    options = {
        "ch": 32,
        "ch_mult": (1, 1, 1),
        "num_res_blocks": 1,
        "resolution": 4 * CODES_A_SIDE,
        "attn_resolutions": (),
        "z_channels": 8,
        "embed_dim": 8,
        "n_embed": CODEBOOK,
        "pixel_range": (0.0, 1.0),
    }
    vqgan = VQGAN(VQGANConfig(**options | config)).eval()
    # Codes that lie far apart give pictures that differ by more than rounding.
    torch.nn.init.normal_(vqgan.codebook, std=2.0)
    return vqgan


def tiny_processor() -> DalleBartProcessor:
    """Byte-level tokens, no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = DalleBartTokenizer(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return DalleBartProcessor(tokenizer, None, max_text_length=12)


def save_tiny(folder: Path, pipe: DallePipeline | None = None) -> Path:
    """Write the folder that `from_pretrained` and `--model` take."""
    (pipe or tiny_pipeline()).save_pretrained(folder)
    return folder
