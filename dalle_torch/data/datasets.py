"""From the options of a run to its loaders: one for training, one for each evaluation set.

Owns: which option goes where. Does not own: the options (`config`), the loaders (`loader`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dalle_torch.config import DataConfig
from dalle_torch.data.loader import TokenLoader
from dalle_torch.data.plan import Plan
from dalle_torch.data.text import TextEncoder
from dalle_torch.data.token_reader import TokenReader
from dalle_torch.data.tokens import TokenShard, find_token_shards


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """The data of a run, as one of its hosts sees it."""

    config: DataConfig
    text: TextEncoder
    """Of the model's processor."""
    image_length: int
    """Codes of a picture."""
    codebook_size: int
    """Codes of the VQGAN; a sample with a larger one is bad."""
    batch_size: int
    """Rows of all hosts together."""
    host_index: int = 0
    host_count: int = 1

    def training_loader(self) -> TokenLoader:
        """Endless batches of `config.train`.

        Raises:
            OSError, ValueError: as `tokens.find_token_shards` and `TokenLoader`.
        """
        config = self.config
        reader = replace(
            self._reader(),
            min_clip_score=config.min_clip_score,
            max_clip_score=config.max_clip_score,
            filter_column=config.filter_column,
            filter_value=config.filter_value,
        )
        shards = self._shards(config.train, reader)
        plan = Plan(
            counts=tuple(shard.samples for shard in shards),
            lanes=config.lanes,
            seed=config.seed,
            window=config.shuffle_buffer // config.lanes,
            shuffle_shards=config.shuffle_buffer > 0,
            blank_prob=config.blank_caption_prob,
        )
        return self._loader(shards, reader, plan, epochs=None)

    def evaluation_loaders(self) -> dict[str, TokenLoader]:
        """The loader of each set of `config.evaluation`, by name: every sample once, as it lies.

        Raises:
            OSError, ValueError: as `training_loader`.
        """
        return {name: self._evaluation_loader(patterns) for name, patterns in self.config.evaluation.items()}

    def _evaluation_loader(self, patterns: Sequence[str]) -> TokenLoader:
        reader = self._reader()
        shards = self._shards(patterns, reader)
        counts = tuple(shard.samples for shard in shards)
        plan = Plan(counts=counts, lanes=self.config.lanes, shuffle_shards=False)
        return self._loader(shards, reader, plan, epochs=1)

    def _reader(self) -> TokenReader:
        return TokenReader(
            image_length=self.image_length,
            codebook_size=self.codebook_size,
            text=self.text.fingerprint,
            vocabulary=self.text.vocabulary,
            max_length=self.text.max_length,
            caption_column=self.config.caption_column,
            encoding_column=self.config.encoding_column,
        )

    def _shards(self, patterns: Sequence[str], reader: TokenReader) -> list[TokenShard]:
        return find_token_shards(
            patterns,
            image_length=self.image_length,
            codebook_size=self.codebook_size,
            columns=reader.columns,
            caption_column=reader.caption_column,
        )

    def _loader(self, shards: Sequence[TokenShard], reader: TokenReader, plan: Plan, epochs: int | None) -> TokenLoader:
        return TokenLoader(
            shards,
            reader,
            self.text,
            plan,
            batch_size=self.batch_size,
            workers=self.config.workers,
            max_bad_fraction=self.config.max_bad_fraction,
            host_index=self.host_index,
            host_count=self.host_count,
            epochs=epochs,
        )
