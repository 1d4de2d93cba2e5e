"""From the options of a run to its loaders: one for training, one for each evaluation set.

Owns: which option goes where. Does not own: the options (`config`), the loaders (`loader`).
"""

from collections.abc import Sequence

from dalle_torch.config import DataConfig
from dalle_torch.data.loader import TokenLoader
from dalle_torch.data.plan import Plan
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_reader import TokenReader
from dalle_torch.data.tokens import find_token_shards


def training_loader(
    config: DataConfig,
    text: TextEncoder,
    *,
    image_length: int,
    codebook_size: int,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
) -> TokenLoader:
    """Endless batches of `config.train`.

    Args:
        text: of the model's processor.
        image_length: codes of a picture.
        codebook_size: codes of the VQGAN; a sample with a larger one is bad.
        batch_size: rows of all hosts together.
        host_index, host_count: which part of them this host takes.

    Raises:
        OSError, ValueError: as `tokens.find_token_shards` and `TokenLoader`.
    """
    reader = TokenReader(
        image_length=image_length,
        codebook_size=codebook_size,
        text=text.fingerprint,
        vocabulary=text.vocabulary,
        max_length=text.max_length,
        min_clip_score=config.min_clip_score,
        max_clip_score=config.max_clip_score,
        filter_column=config.filter_column,
        filter_value=config.filter_value,
        caption_column=config.caption_column,
        encoding_column=config.encoding_column,
    )
    shards = find_token_shards(
        config.train, image_length=image_length, codebook_size=codebook_size, columns=reader.columns
    )
    plan = Plan(
        counts=tuple(shard.samples for shard in shards),
        lanes=config.lanes,
        seed=config.seed,
        window=config.shuffle_buffer // config.lanes,
        shuffle_shards=config.shuffle_buffer > 0,
        blank_prob=config.blank_caption_prob,
    )
    return TokenLoader(
        shards, reader, text, plan, batch_size=batch_size, workers=config.workers,
        max_bad_fraction=config.max_bad_fraction, host_index=host_index, host_count=host_count,
    )  # fmt: skip


def evaluation_loader(
    patterns: str | Sequence[str],
    config: DataConfig,
    text: TextEncoder,
    *,
    image_length: int,
    codebook_size: int,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
) -> TokenLoader:
    """Every sample of `patterns` once, as it lies, in as many batches on every host; arguments as `training_loader`.

    Raises:
        OSError, ValueError: as there.
    """
    reader = TokenReader(
        image_length=image_length,
        codebook_size=codebook_size,
        text=text.fingerprint,
        vocabulary=text.vocabulary,
        max_length=text.max_length,
        caption_column=config.caption_column,
        encoding_column=config.encoding_column,
    )
    shards = find_token_shards(patterns, image_length=image_length, codebook_size=codebook_size, columns=reader.columns)
    plan = Plan(counts=tuple(shard.samples for shard in shards), lanes=config.lanes, shuffle_shards=False)
    return TokenLoader(
        shards, reader, text, plan, batch_size=batch_size, workers=config.workers,
        max_bad_fraction=config.max_bad_fraction, host_index=host_index, host_count=host_count, epochs=1,
    )  # fmt: skip


def evaluation_loaders(
    config: DataConfig,
    text: TextEncoder,
    *,
    image_length: int,
    codebook_size: int,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
) -> dict[str, TokenLoader]:
    """The loader of each set of `config.evaluation`, by name; arguments as `training_loader`.

    Raises:
        OSError, ValueError: as there.
    """
    return {
        name: evaluation_loader(
            patterns, config, text, image_length=image_length, codebook_size=codebook_size, batch_size=batch_size,
            host_index=host_index, host_count=host_count,
        )
        for name, patterns in config.evaluation.items()
    }  # fmt: skip
