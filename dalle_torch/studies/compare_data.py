"""The data that all rows of a comparison share, made once, and what a guess without a model is worth on them.

Owns: captioned shapes as shards, the chance level. Does not own: drawing (`shapes`), encoding (`data.encode`).
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_torch.config import RunConfig, ShapesDataConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.encode import EncodeOptions, encode
from dalle_torch.data.loader import TokenLoader
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.scenes import scene_parts
from dalle_torch.data.text import TextEncoder
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.storage.embedded import EMBEDDED
from dalle_torch.studies.compare_config import ComparisonDataConfig
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.training.setup import load_processor, model_config

_ENCODE_BATCH = 16
_MOST_BATCHES = 500
"""Of training data that the frequencies of image tokens are counted in."""


def data_options(config: ComparisonDataConfig, folder: Path) -> dict[str, Any]:
    """Options of a run by dotted name that lead to what `make_data` makes; nothing is made here."""
    made = _folder(config, folder)
    source = _source(config)
    return {
        "model.config": source,
        "model.tokenizer": source,
        "data.train": [str(made / "train")],
        "data.evaluation": {"shapes": [str(made / "evaluation")]},
    }


def make_data(config: ComparisonDataConfig, folder: Path) -> None:
    """Draw and encode the shapes below `folder`, if they are not there; an interrupted call goes on.

    Raises:
        OSError: it cannot be written, or the model is not there.
    """
    made = _folder(config, folder)
    if (made / "done").exists():
        return
    made.mkdir(parents=True, exist_ok=True)
    # Several commands may work on rows of one comparison.
    with (made / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "done").exists():
            _make(config, made)


def _make(config: ComparisonDataConfig, made: Path) -> None:
    source = _source(config)
    vqgan = VQGAN.from_pretrained(f"{source}/vqgan").eval().to(memory_format=torch.channels_last)
    text = TextEncoder(DalleBartProcessor.from_pretrained(source))
    evaluation = ShapesDataConfig(
        scenes=config.evaluation_scenes, seed=config.evaluation_seed, single=config.shapes.single, leave_out=0,
        open_shapes=0,
    )  # fmt: skip
    options = EncodeOptions(batch_size=_ENCODE_BATCH, threads=1)
    with _one_thread():
        for name, shapes in (("train", config.shapes), ("evaluation", evaluation)):
            encode(scene_parts(shapes), ShardFolder(str(made / name)), vqgan, text, options)
    (made / "done").touch()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums depends on the count of threads, and on it which of two codes is as near as the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def chance_level(config: RunConfig) -> float:
    """The cross entropy, in nats a token, of the evaluation sets under the frequencies of the image tokens in the
    training data (one added to each count): what a model has that knows neither text nor picture."""
    network = model_config(config.model)
    data = TokenData(
        config=replace(config.data, evaluation={"": config.data.train}, workers=0),
        text=TextEncoder(load_processor(config.model, network)),
        image_length=network.image_length,
        codebook_size=network.image_vocab_size,
        batch_size=config.training.batch_size,
    )
    train = _counts(data.evaluation_loaders().values(), network.image_vocab_size)
    data = replace(data, config=replace(config.data, workers=0))
    losses = []
    frequencies = (train + 1) / (train + 1).sum()
    # The mean over sets, as the evaluation loss is.
    for loader in data.evaluation_loaders().values():
        counts = _counts([loader], network.image_vocab_size)
        losses.append(float(-(counts / counts.sum() * frequencies.log()).sum()))
    return sum(losses) / len(losses)


def _counts(loaders: Iterable[TokenLoader], size: int) -> Tensor:
    """float64 [size]: how often each image token comes."""
    counts = torch.zeros(size, dtype=torch.float64)
    for loader in loaders:
        for batch in islice(iter(loader), min(loader.steps, _MOST_BATCHES)):
            counts += torch.bincount(batch.labels[batch.valid].flatten(), minlength=size)
    return counts


def _folder(config: ComparisonDataConfig, folder: Path) -> Path:
    """Other data have another folder, so runs never change theirs unnoticed."""
    made_with = json.dumps(asdict(config), sort_keys=True)
    return folder / "data" / hashlib.sha256(made_with.encode()).hexdigest()[:12]


def _source(config: ComparisonDataConfig) -> str:
    return str(EMBEDDED[config.model]) if config.model in EMBEDDED else config.model
