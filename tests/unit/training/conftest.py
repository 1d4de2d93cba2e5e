"""A model small enough to train in a test, and batches that it can learn."""

from collections.abc import Callable

import pytest
import torch

from dalle_torch.config import OptimizerConfig
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.build import build_optimizer
from dalle_torch.training.state import TrainState
from dalle_torch.training.step import Batch


@pytest.fixture
def config() -> DalleBartConfig:
    return DalleBartConfig(
        encoder_vocab_size=12, image_vocab_size=10, image_length=9, max_text_length=6, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
        dropout=0.0, use_glu=True,
    )  # fmt: skip


@pytest.fixture
def make_state(config: DalleBartConfig) -> Callable[..., TrainState]:
    def make(optimizer: OptimizerConfig | None = None) -> TrainState:
        torch.manual_seed(0)
        model = DalleBart(config)
        return TrainState(model, build_optimizer(model, optimizer or OptimizerConfig(weight_decay=0.1)))

    return make


@pytest.fixture
def batches() -> Callable[[int], Batch]:
    """The picture repeats the prompt's first token, so there is something to learn."""

    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 10, (8, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :1].expand(-1, 9)}

    return batch
