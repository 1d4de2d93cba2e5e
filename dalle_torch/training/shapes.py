"""The embedded model from nothing: tokenizer, codebook, codes of captioned shapes, DalleBart, and their folder.

    USE_TORCH_XLA=0 python -m dalle_torch.training.shapes configs/train/shapes.yaml --output runs/shapes

The variable matters where torch_xla is installed, whose device transformers would take. Every stage leaves its result
in the output folder and is skipped where that is there, so the command can be repeated.

Owns: the recipe. Does not own: the loops (`loop`, `vqgan`), the data (`data.synthetic`), what a picture is worth
(`data.shapes_checker`).
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from dalle_torch.config import ShapesConfig, ShapesDataConfig, ShapesEvaluationConfig
from dalle_torch.config_io import load_config
from dalle_torch.data.shapes_checker import check
from dalle_torch.data.synthetic import Scene, render, sample_scenes
from dalle_torch.log import get_logger, progress
from dalle_torch.models.configuration import DalleBartConfig, VQGANConfig
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.vqgan import VQGAN
from dalle_torch.optim.build import build_optimizer
from dalle_torch.storage import atomic_file, atomic_folder
from dalle_torch.text.processor import DalleBartProcessor
from dalle_torch.text.tokenizer import DalleBartTokenizer
from dalle_torch.training.loop import EVALUATION_LOSS, train
from dalle_torch.training.state import TrainState
from dalle_torch.training.step import Batch
from dalle_torch.training.vqgan import initialise, train_vqgan

logger = get_logger(__name__)

_ENCODE_BATCH = 16
"""Few enough that a network's activations stay in the processor's cache."""
_ENCODE_REPORT = 4000
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def build_tokenizer(captions: Sequence[str]) -> DalleBartTokenizer:
    """Byte-level BPE in which each word of `captions` is one token and any other text falls apart into bytes.

    Case, punctuation and the spellings "center" and "grey" make no difference.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Replace("center", "centre"),
            normalizers.Replace("grey", "gray"),
            normalizers.Strip(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return DalleBartTokenizer(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@dataclass
class ShapesDataset:
    """Captions and codes of the scenes of one pass, in memory.

    Attributes:
        input_ids, attention_mask: int64 [scenes, T], T the longest caption's tokens.
        blank_ids, blank_mask: the empty caption, int64 [T].
        codes: int16 or int64 [scenes, image_length].
    """

    input_ids: Tensor
    attention_mask: Tensor
    blank_ids: Tensor
    blank_mask: Tensor
    codes: Tensor
    batch_size: int
    blank: float
    seed: int

    @property
    def batches_in_pass(self) -> int:
        return len(self.codes) // self.batch_size

    def __call__(self, index: int) -> Batch:
        """Batch `index` of an endless sequence: every pass has another order and blanks other captions."""
        epoch, position = divmod(index, self.batches_in_pass)
        order = torch.randperm(len(self.codes), generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        generator = torch.Generator().manual_seed((self.seed << 32) + index)
        blanked = torch.rand(len(rows), 1, generator=generator) < self.blank
        return {
            "input_ids": torch.where(blanked, self.blank_ids, self.input_ids[rows]),
            "attention_mask": torch.where(blanked, self.blank_mask, self.attention_mask[rows]),
            "labels": self.codes[rows].long(),
        }


def make_dataset(
    processor: DalleBartProcessor, codes: np.ndarray, data: ShapesDataConfig, batch_size: int
) -> ShapesDataset:
    """Pair the codes of `encode_scenes` with their captions."""
    captions = [scene.caption for scene in training_scenes(data)[: len(codes)]]
    batch = processor(captions)
    length = int(batch["attention_mask"].sum(1).max())
    return ShapesDataset(
        input_ids=batch["input_ids"][:, :length],
        attention_mask=batch["attention_mask"][:, :length],
        blank_ids=batch["input_ids_uncond"][0, :length],
        blank_mask=batch["attention_mask_uncond"][0, :length],
        codes=torch.from_numpy(codes.astype(np.int16)),
        batch_size=batch_size,
        blank=data.blank,
        seed=data.seed,
    )


def training_scenes(data: ShapesDataConfig) -> list[Scene]:
    """The scenes of one pass; none shows a held-out pair."""
    return sample_scenes(
        data.scenes, data.seed, single=data.single, leave_out=data.leave_out, open_shapes=data.open_shapes
    )


def encode_scenes(vqgan: VQGAN, data: ShapesDataConfig) -> np.ndarray:
    """Draw the scenes of one pass and encode them: int16 [scenes, image_length]."""
    scenes = training_scenes(data)
    codes = np.empty((len(scenes), vqgan.config.image_length), dtype=np.int16)
    for start in progress(range(0, len(scenes), _ENCODE_BATCH), desc="encoding", unit="batch"):
        pictures = render(scenes[start : start + _ENCODE_BATCH], data.seed, start=start)
        codes[start : start + _ENCODE_BATCH] = vqgan.encode(to_pixels(pictures, vqgan)).numpy()
        if start % _ENCODE_REPORT == 0:
            logger.info("encoded %d of %d scenes", start, len(scenes))
    return codes


def to_pixels(pictures: np.ndarray, vqgan: VQGAN) -> Tensor:
    """uint8 [B, H, W, 3] to what `vqgan` encodes."""
    black, white = vqgan.config.pixel_range
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * ((white - black) / 255) + black
    return values.contiguous(memory_format=torch.channels_last)


def evaluate(
    model: DalleBart, processor: DalleBartProcessor, vqgan: VQGAN, config: ShapesEvaluationConfig
) -> dict[str, float]:
    """The loss on scenes of pairs that were trained on, and the accuracy of drawn pictures.

    That is the share that show what their captions say, "seen" and "unseen", and what went wrong.
    """
    scenes = sample_scenes(config.prompts, config.seed)
    found = {EVALUATION_LOSS: _loss(model, processor, vqgan, scenes, config.seed)}
    for name, unseen in (("seen", False), ("unseen", True)):
        scenes = sample_scenes(config.prompts, config.seed, unseen=unseen)
        images = _draw(model, processor, vqgan, scenes, config)
        reports = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
        found[name] = sum(report.ok for report in reports) / len(reports)
        wrong = Counter(failure for report in reports for failure in report.failures)
        found |= {f"{name}_{failure}": count / len(reports) for failure, count in sorted(wrong.items())}
    return found


@torch.no_grad()
def _loss(model: DalleBart, processor: DalleBartProcessor, vqgan: VQGAN, scenes: Sequence[Scene], seed: int) -> float:
    batch = processor([scene.caption for scene in scenes])
    labels = vqgan.encode(to_pixels(render(scenes, seed), vqgan)).long()
    return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss)


def _draw(
    model: DalleBart,
    processor: DalleBartProcessor,
    vqgan: VQGAN,
    scenes: Sequence[Scene],
    config: ShapesEvaluationConfig,
) -> list:
    tokens = model.generate(
        **processor([scene.caption for scene in scenes]),
        temperature=config.temperature,
        condition_scale=config.condition_scale,
        generator=torch.Generator().manual_seed(config.seed),
        max_token=vqgan.config.n_embed,
    )
    return vqgan.pixels_to_images(vqgan.decode(tokens[:, 1:]))


def run(config: ShapesConfig, output: Path) -> Path:
    """All stages; returns the folder of the finished model.

    Raises:
        KeyboardInterrupt: Ctrl-C; what is done is kept, and calling this again goes on from there.
    """
    output.mkdir(parents=True, exist_ok=True)
    vqgan = _trained_vqgan(config, output)
    captions = [scene.caption for scene in sample_scenes(20_000, config.data.seed)]
    captions += [scene.caption for scene in sample_scenes(2_000, config.data.seed, leave_out=0.5, open_shapes=0.5)]
    network = DalleBartConfig(**config.model)
    processor = DalleBartProcessor(build_tokenizer(captions), None, network.max_text_length)
    dataset = make_dataset(processor, _codes(vqgan, config, output), config.data, config.training.batch_size)
    torch.manual_seed(config.training.seed)
    model = DalleBart(
        DalleBartConfig(
            **config.model | {"image_vocab_size": vqgan.config.n_embed, "encoder_vocab_size": len(processor.tokenizer)}
        )
    )
    logger.info("DalleBart has %d parameters", model.num_parameters())
    state = TrainState(model, build_optimizer(model, config.optimizer))
    train(
        state,
        dataset,
        config.optimizer,
        config.training,
        output / "model",
        lambda state: evaluate(state.model, processor, vqgan, config.evaluation),
    )
    if state.step < config.training.steps:
        raise KeyboardInterrupt
    with atomic_folder(output / "export") as target:
        state.model.save_pretrained(target)
        processor.tokenizer.save_pretrained(target)
        vqgan.save_pretrained(target / "vqgan")
    return output / "export"


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
        shutil.copytree(output / "vqgan-run" / "vqgan", folder)
    return VQGAN.from_pretrained(folder).eval().to(memory_format=torch.channels_last)


def _codes(vqgan: VQGAN, config: ShapesConfig, output: Path) -> np.ndarray:
    path = output / "codes.npy"
    if not path.is_file():
        codes = encode_scenes(vqgan, config.data)
        with atomic_file(path) as target:
            np.save(target, codes)
    return np.load(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dalle_torch.training.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="YAML file, such as configs/train/shapes.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an old run in it goes on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay an option over the file")
    options = parser.parse_args(arguments)
    try:
        print(run(load_config(ShapesConfig, options.config, options.set), options.output))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
