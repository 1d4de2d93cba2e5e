"""A model of captioned shapes from nothing: codebook, judge, tokenizer, shards of codes, DalleBart, and their folder.

Every stage leaves its result in the output folder and is skipped where that is there, so the command can be repeated
(`dalle-torch demo --train`).

Owns: the recipe. Does not own: the loops (`run`, `vqgan`), the data (`data.scenes`), what a picture is worth
(`shapes.checker`).
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_torch.checkpoint.export import export_model
from dalle_torch.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, ShapesConfig, ShapesDataConfig
from dalle_torch.config import ShapesEvaluationConfig as EvaluationConfig
from dalle_torch.data.encode import EncodeOptions, encode
from dalle_torch.data.manifest import ShardFolder
from dalle_torch.data.scenes import scene_parts
from dalle_torch.data.text import TextEncoder
from dalle_torch.log import get_logger
from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.shapes.checker import check
from dalle_torch.shapes.classifier import ShapesClassifier
from dalle_torch.shapes.drawing import render
from dalle_torch.shapes.grammar import Scene
from dalle_torch.shapes.sampling import sample_scenes
from dalle_torch.storage import atomic_folder
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.training.run import train_run
from dalle_torch.training.shapes_judge import train_judge
from dalle_torch.training.shapes_text import build_tokenizer
from dalle_torch.training.vqgan import initialise, train_vqgan

logger = get_logger(__name__)

_ENCODE_BATCH = 16
"""Few enough that a network's activations stay in the processor's cache."""
_EVALUATION_SCENES = 256


def run_recipe(config: ShapesConfig, output: str | os.PathLike[str]) -> Path | None:
    """All stages; returns the folder of the finished model, or None if the training was stopped in order before its
    end. Calling it again goes on from there.

    Raises:
        KeyboardInterrupt: Ctrl-C; what is done is kept.
        OSError: the folder cannot be written or is in use.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    vqgan = _trained_vqgan(config, folder)
    judge = _trained_judge(config, vqgan, folder / "judge")
    processor = _start(config, vqgan, folder / "start")
    _encode(config.data, vqgan, processor, folder / "tokens")
    evaluation = ShapesDataConfig(scenes=_EVALUATION_SCENES, seed=config.evaluation.seed, leave_out=0, open_shapes=0)
    _encode(evaluation, vqgan, processor, folder / "evaluation")
    scorer = Scorer(processor, vqgan, config.evaluation)
    outcome = train_run(run_config(config, folder), folder / "run", scorer)
    if outcome == "interrupted":
        raise KeyboardInterrupt
    if outcome != "finished":
        return None
    # Written anew each time: it costs little, and a longer run may have gone on.
    export_model(folder / "run", folder / "export", vqgan=folder / "vqgan", overwrite=True)
    judge.save(folder / "export" / "judge")
    return folder / "export"


def run_config(config: ShapesConfig, folder: Path) -> RunConfig:
    """The run of `training.run` that trains the model of the recipe."""
    return RunConfig(
        model=ModelConfig(config=str(folder / "start"), vqgan=str(folder / "vqgan")),
        data=DataConfig(
            train=[str(folder / "tokens")],
            evaluation={"shapes": [str(folder / "evaluation")]},
            seed=config.data.seed,
            lanes=min(8, config.training.batch_size),
            workers=1,
            shuffle_buffer=min(config.data.scenes, 65_536),
            blank_caption_prob=config.data.blank,
        ),
        optimizer=config.optimizer,
        training=config.training,
        checkpoint=CheckpointConfig(keep=2),
    )


class Scorer:
    """The share of drawn pictures that show what their captions say, and what went wrong.

    "seen" has pairs of colour and shape that were trained on, "unseen" one that was not, "one_object" seen ones alone.
    """

    def __init__(self, processor: DalleBartProcessor, vqgan: VQGAN, config: EvaluationConfig) -> None:
        self.processor, self.vqgan, self.config = processor, vqgan, config

    def __call__(self, model: DalleBart, step: int) -> Mapping[str, float]:
        training = model.training
        model.eval()
        found: dict[str, float] = {}
        kinds = (("seen", False, 0.4), ("unseen", True, 0.4), ("one_object", False, 1.0))
        for name, unseen, single in kinds:
            scenes = sample_scenes(self.config.prompts, self.config.seed, unseen=unseen, single=single)
            images = self._draw(model, scenes)
            reports = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
            found[name] = sum(report.ok for report in reports) / len(reports)
            wrong = Counter(failure for report in reports for failure in report.failures)
            found |= {f"{name}_{failure}": count / len(reports) for failure, count in sorted(wrong.items())}
        model.train(training)
        return found

    def _draw(self, model: DalleBart, scenes: Sequence[Scene]) -> list[Image.Image]:
        tokens = model.generate(
            **self.processor([scene.caption for scene in scenes]),
            temperature=self.config.temperature,
            condition_scale=self.config.condition_scale,
            generator=torch.Generator().manual_seed(self.config.seed),
            max_token=self.vqgan.config.n_embed,
        )
        return self.vqgan.pixels_to_images(self.vqgan.decode(tokens[:, 1:]))


def _trained_vqgan(config: ShapesConfig, output: Path) -> VQGAN:
    folder = output / "vqgan"
    if not folder.is_dir():
        torch.manual_seed(config.vqgan_training.seed)
        seed = config.data.seed + 1

        def pictures(start: int, count: int) -> np.ndarray:
            scenes = sample_scenes(count, seed, start=start, single=0.2, open_shapes=0.5)
            return render(scenes, seed, start=start)

        vqgan = VQGAN(VQGANConfig(**config.vqgan))
        initialise(vqgan)
        train_vqgan(vqgan, pictures, config.vqgan_training, output / "vqgan-run")
        with atomic_folder(folder) as target:
            shutil.copytree(output / "vqgan-run" / "vqgan", target, dirs_exist_ok=True)
    return VQGAN.from_pretrained(folder).eval().to(memory_format=torch.channels_last)


def _trained_judge(config: ShapesConfig, vqgan: VQGAN, folder: Path) -> ShapesClassifier:
    if not folder.is_dir():
        judge, accuracies = train_judge(vqgan, config.judge)
        worst = min(accuracies, key=lambda name: accuracies[name])
        logger.info("the judge is right in %.1f %% or more, least about %s", 100 * accuracies[worst], worst)
        judge.save(folder)
    return ShapesClassifier.load(folder)


def _start(config: ShapesConfig, vqgan: VQGAN, folder: Path) -> DalleBartProcessor:
    """The tokenizer, and a folder with it and the configuration of the model that is to be."""
    captions = [scene.caption for scene in sample_scenes(20_000, config.data.seed)]
    captions += [scene.caption for scene in sample_scenes(2_000, config.data.seed, leave_out=0.5, open_shapes=0.5)]
    tokenizer = build_tokenizer(captions)
    sizes: dict[str, Any] = {"image_vocab_size": vqgan.config.n_embed, "encoder_vocab_size": len(tokenizer)}
    network = DalleBartConfig(**config.model | sizes)
    processor = DalleBartProcessor(tokenizer, None, network.max_text_length)
    with atomic_folder(folder) as target:
        network.save_pretrained(target)
        processor.save_pretrained(target)
    return processor


def _encode(data: ShapesDataConfig, vqgan: VQGAN, processor: DalleBartProcessor, folder: Path) -> None:
    options = EncodeOptions(batch_size=_ENCODE_BATCH, threads=1)
    encode(scene_parts(data), ShardFolder(str(folder)), vqgan, TextEncoder(processor), options)
