"""From the options of a run to everything that its loop drives, checked before anything is computed.

Owns: the order of making things, and the checks that need two of them. Does not own: the things, the loop (`loop`).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dalle_torch.config import DataConfig, ModelConfig, RunConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.loader import TokenLoader
from dalle_torch.data.text import TextEncoder
from dalle_torch.log import get_logger
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.optim.build import build_optimizer, prepare
from dalle_torch.optim.saving import describe, load_state, state_tensors
from dalle_torch.parallel.engine import Engine, plan_batches
from dalle_torch.parallel.mesh import BatchPlan
from dalle_torch.parallel.rules import layout_rules
from dalle_torch.storage import resolve
from dalle_torch.storage.embedded import located
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.training.agreement import compare_weights
from dalle_torch.training.state import TrainState
from dalle_torch.training.trainable import choose_trained, reinitialize_embeddings

logger = get_logger(__name__)


@dataclass
class Run:
    """All that a loop drives.

    Attributes:
        config: as it holds now; the loop changes it when settings are adjusted.
        network: what the step calls: `state.model`, or what the engine put around it.
    """

    config: RunConfig
    engine: Engine
    batches: BatchPlan
    processor: DalleBartProcessor
    data: TokenData
    training: TokenLoader
    evaluation: dict[str, TokenLoader]
    network: nn.Module
    state: TrainState

    def with_data(self, config: DataConfig) -> None:
        """Go on with other options of the data, from the place in it that was reached."""
        self.data = replace(self.data, config=config)
        loader = self.data.training_loader()
        loader.load_state_dict(self.training.state_dict())
        self.training = loader

    def new_optimizer(self, before: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """One with the groups that `config` asks for now, in the state of `before`."""
        options = self.engine.optimizer_options(self.config.optimizer.name)
        optimizer = build_optimizer(self.state.model, self.config.optimizer, split_decay=True, **options)
        prepare(optimizer)
        load_state(optimizer, state_tensors(before), describe(before))
        self.engine.place_state(optimizer)
        return optimizer


def prepare_run(config: RunConfig, engine: Engine, split_decay: bool = False) -> Run:
    """Find the data, make or load the model, lay it out on the devices, make the optimizer.

    Args:
        split_decay: group parameters by whether they decay even if nothing decays now, as a run does whose weight
            decay was another one before.

    Raises:
        OSError: a source is not there or cannot be reached.
        ValueError: things do not fit each other; the message names both.
    """
    batches = plan_batches(engine, config.training)
    network_config = model_config(config.model)
    processor = load_processor(config.model, network_config)
    data = TokenData(
        config=config.data,
        text=TextEncoder(processor),
        image_length=network_config.image_length,
        codebook_size=_codebook_size(config.model, network_config),
        batch_size=config.training.batch_size,
        host_index=engine.host_index,
        host_count=engine.host_count,
    )
    training, evaluation = data.training_loader(), data.evaluation_loaders()
    model = make_model(config, network_config)
    trained = choose_trained(model, config.model.train)
    compare_weights(engine, model)
    logger.info(
        "DalleBart of %s parameters, %s of them trained",
        f"{model.num_parameters():,}",
        f"{sum(model.get_parameter(name).numel() for name in trained):,}",
    )
    network, optimizer = place_training(config, engine, model, split_decay)
    state = TrainState(model, optimizer)
    return Run(config, engine, batches, processor, data, training, evaluation, network, state)


def place_training(
    config: RunConfig, engine: Engine, model: DalleBart, split_decay: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Lay `model` out on the devices and make its optimizer there, with the state that a first update finds.

    Returns:
        What a step calls, and the optimizer.

    Raises:
        ValueError: the model cannot be laid out, or the optimizer does not run there.
    """
    network = engine.place(model, layout_rules(model.config))
    optimizer = build_optimizer(
        model, config.optimizer, split_decay=split_decay, **engine.optimizer_options(config.optimizer.name)
    )
    prepare(optimizer)
    engine.place_state(optimizer)
    model.train()
    return network, optimizer


def model_config(config: ModelConfig) -> DalleBartConfig:
    """The configuration of the model that is trained.

    Raises:
        OSError: its source is not there.
        ValueError: it is malformed.
    """
    if config.weights is None:
        assert config.config is not None
        found = _config_at(config.config, config.revision)
        unknown = [key for key in config.options if not hasattr(found, key)]
        if unknown:
            raise ValueError(f"model.options has keys that DalleBartConfig does not know: {', '.join(unknown)}")
        return DalleBartConfig(**found.to_dict() | config.options)
    return _config_at(config.weights, config.revision)


def _config_at(source: str, revision: str | None) -> DalleBartConfig:
    """Of a file, or of whatever weights are loaded from: transformers knows folders and the hub alone."""
    source = str(located(source))
    if source.endswith(".json") and "://" not in source:
        if not Path(source).expanduser().is_file():
            raise FileNotFoundError(f"model.config={source} is not there: name a config.json, or what has one")
        return DalleBartConfig.from_pretrained(Path(source).expanduser())
    return DalleBartConfig.from_pretrained(resolve(source, allow_patterns=["config.json"], revision=revision))


def load_processor(config: ModelConfig, network: DalleBartConfig) -> DalleBartProcessor:
    """The tokenizer and its normalisation, at the length of the model's prompts.

    Raises:
        OSError: there is none at its source.
        ValueError: it has more tokens than the model.
    """
    source = config.tokenizer or config.weights or config.config
    assert source is not None
    if source.endswith(".json"):
        raise ValueError(f"model.config={source} is a file without tokenizer: set model.tokenizer to a source of one")
    revision = config.revision if config.tokenizer is None else None
    found = DalleBartProcessor.from_pretrained(
        located(source), normalize_text=network.normalize_text, revision=revision
    )
    size = len(found.tokenizer)
    if size > network.encoder_vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {size} tokens, more than the model's encoder_vocab_size="
            f"{network.encoder_vocab_size}: take its own tokenizer, or set model.options.encoder_vocab_size"
        )
    return DalleBartProcessor(found.tokenizer, found.normalizer, network.max_text_length)


def make_model(config: RunConfig, network: DalleBartConfig) -> DalleBart:
    """A new model, the same from the same seed on every machine, or one that is fine-tuned; float32, on the CPU."""
    source = config.model
    if source.weights is None:
        torch.manual_seed(config.training.seed)
        return DalleBart(network)
    model = DalleBart.from_pretrained(
        located(source.weights), revision=source.revision, trust_pickle=source.trust_pickle, dtype=torch.float32
    )
    if source.reinitialize_embeddings:
        drawn = reinitialize_embeddings(model, config.training.seed)
        logger.info("drawn anew: %s", ", ".join(drawn))
    return model


def _codebook_size(config: ModelConfig, network: DalleBartConfig) -> int:
    if config.codebook_size is None:
        return network.image_vocab_size
    if config.codebook_size > network.image_vocab_size:
        raise ValueError(
            f"model.codebook_size={config.codebook_size} exceeds the model's image_vocab_size="
            f"{network.image_vocab_size}: its labels would have no row; set model.options.image_vocab_size"
        )
    return config.codebook_size
