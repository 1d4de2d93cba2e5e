"""A small model that every unit test of the networks can draw with."""

import pytest
import torch

from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart


def small_config(**overrides: object) -> DalleBartConfig:
    return DalleBartConfig(
        **{
            "encoder_vocab_size": 50,
            "image_vocab_size": 24,
            "image_length": 9,
            "max_text_length": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "d_model": 32,
            "dropout": 0.0,
            "use_glu": True,
            "init_std": 0.3,
            **overrides,
        }
    )


def small_model(**overrides: object) -> DalleBart:
    torch.manual_seed(0)
    return DalleBart(small_config(**overrides)).eval()


@pytest.fixture(scope="session")
def model() -> DalleBart:
    return small_model()


@pytest.fixture(scope="session")
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, and the empty one."""
    ids = torch.tensor([[0, 5, 6, 7, 8, 2, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1], [0, 10, 11, 12, 13, 14, 15, 2]])
    empty = torch.tensor([[0, 2, 1, 1, 1, 1, 1, 1]]).expand(3, -1).clone()
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "input_ids_uncond": empty,
        "attention_mask_uncond": (empty != 1).long(),
    }
