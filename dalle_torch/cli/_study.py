"""What the commands that measure a model share: options, judges, data.

Owns: the options and what they mean. Does not own: the studies (`studies`).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_torch.cli.generate import add_model_arguments, load_pipeline, writable_folder

if TYPE_CHECKING:
    from dalle_torch.data.captioned import CaptionedData
    from dalle_torch.evaluation.base import FeatureExtractor, TextImageScorer
    from dalle_torch.pipeline import DallePipeline
    from dalle_torch.studies.evaluate import EvaluationOptions

__all__ = ["add_study_arguments", "load_study", "writable_folder"]

SHAPES = "shapes"

_OPTIONS: dict[tuple[str, ...], dict[str, Any]] = {
    ("model_source",): {
        "nargs": "?", "metavar": "MODEL",
        "help": "the embedded model shapes, a hub id, a folder, an artifact; instead of --model",
    },
    ("--data",): {
        "nargs": "+", "metavar": "SHARDS",
        "help": "captioned pictures: shards of codes or of pictures, parquet files, a folder with metadata.jsonl; "
        "shapes draws captioned shapes (the default for models of 64 x 64 pixels)",
    },
    ("--caption-key",): {"metavar": "KEY", "help": "JSON key or column of the captions"},
    ("--limit",): {
        "type": int, "default": 1000, "metavar": "N", "help": "samples that are read, and prompts drawn; 0: all",
    },
    ("--data-seed",): {"type": int, "default": 2026, "metavar": "N", "help": "of the captioned shapes"},
    ("--features",): {
        "metavar": "JUDGE",
        "help": "who sees features for FID and KID: inception, a file of its weights, or shapes; by default shapes for "
        "models that have such a judge, else inception",
    },
    ("--clip",): {
        "metavar": "JUDGE",
        "help": "who says how well pictures show their prompts: a CLIP model's hub id or folder, "
        "open_clip:ARCHITECTURE:FILE, or shapes; by default shapes for models that have such a judge, else "
        "openai/clip-vit-large-patch14",
    },
}  # fmt: skip


def add_study_arguments(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    """Options that say what is measured, on what, and who judges."""
    for names, options in _OPTIONS.items():
        parser.add_argument(*names, **options)
    parser.add_argument(
        "--num-images", type=int, default=num_images, metavar="N", help="pictures of each prompt; two or more have a "
        "diversity",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each has another one")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures drawn at once; by default what fits; on "
                        "the CPU no figure depends on it")  # fmt: skip
    add_model_arguments(parser)


def load_study(
    args: argparse.Namespace,
) -> "tuple[DallePipeline, CaptionedData, FeatureExtractor, TextImageScorer, EvaluationOptions]":
    """The model, the data, both judges and the options that `add_study_arguments` describes.

    Raises:
        OSError, ValueError: something is not there or does not fit; nothing was drawn then.
    """
    from dalle_torch.storage import resolve
    from dalle_torch.storage.embedded import located
    from dalle_torch.studies.evaluate import EvaluationOptions

    if args.quantize or args.compile:
        raise ValueError("scores are of the model as it is: leave out --quantize and --compile")
    args.model = args.model_source or args.model
    options = EvaluationOptions(
        limit=args.limit or None, num_images=args.num_images, seed=args.seed, batch_size=args.batch_size
    )
    # A misspelt model is told first, and judges are looked for before large weights are loaded.
    resolve(located(args.model), allow_patterns=["config.json"], revision=args.revision)
    judges = _judges(args)
    pipe = load_pipeline(args, image_processors=True, pack=False)
    return pipe, _data(args, pipe), *judges, options


def _judges(args: argparse.Namespace) -> "tuple[FeatureExtractor, TextImageScorer]":
    import torch

    from dalle_torch.evaluation.loading import load_features, load_scorer, shapes_judge
    from dalle_torch.parallel.runtime import pick_device

    own = args.model if shapes_judge(args.model) is not None else None
    chosen = pick_device(args.device)
    device = chosen if chosen.type == "cuda" else None
    if device is not None:
        # Published figures are float32's; cuDNN would round to ten bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    features = load_features(args.features or own or "inception", device=device)
    return features, load_scorer(args.clip or own or "openai/clip-vit-large-patch14", device=device)


def _data(args: argparse.Namespace, pipe: "DallePipeline") -> "CaptionedData":
    from dalle_torch.data.captioned import CaptionedData, holds_codes
    from dalle_torch.data.vqgan_match import check_made_by

    config = pipe.vqgan.config
    names: list[Any] = args.data or ([SHAPES] if config.resolution == 64 else [])
    if not names:
        raise ValueError("no data is named: give --data SHARDS, captioned pictures to compare with")
    if names == [SHAPES] and not args.limit:
        raise ValueError("captioned shapes have no end: give --limit N")
    if holds_codes(names):
        check_made_by(names, pipe.vqgan, "the model's")
    return CaptionedData(
        [str(name) for name in names], config.resolution, config.image_length, config.n_embed,
        caption_key=args.caption_key, seed=args.data_seed,
    )  # fmt: skip


def folder_of(args: argparse.Namespace, default: str) -> Path:
    """Where the study goes: `--output`, or a folder named after the model."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in str(args.model).strip("/"))
    return Path(args.output or f"{default}-{name[-60:]}")
