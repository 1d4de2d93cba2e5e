"""Write a checkpoint of a training run as a Hugging Face folder, with tokenizer and model card.

Owns: the options of the command, and what it prints. Does not own: what goes into the folder (`checkpoint.export`).
"""

import argparse
import sys
from pathlib import Path

from dalle_torch.cli._push import push

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, its folder of checkpoints (also gs:// and the like), or one checkpoint, step-NNNNNNNN",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; it appears whole or not at all"
    )
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step, instead of the newest")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights, instead of what they are in")
    parser.add_argument(
        "--tokenizer", metavar="SOURCE", help="folder or hub id to take it from, where it is not in the run's folder"
    )
    parser.add_argument("--vqgan", metavar="SOURCE", help="folder or hub id of the VQGAN, which is then put beside")
    parser.add_argument("--name", help="title of the model card, instead of the name of DIR")
    parser.add_argument("--license", metavar="ID", help="licence of the weights in the model card, such as apache-2.0")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR and everything in it")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository on the hub")
    parser.add_argument("--private", action="store_true", help="only you see the repository, if it is a new one")
    parser.add_argument(
        "--token",
        help="of the hub, instead of that of hf auth login or HF_TOKEN, which others on the machine cannot see",
    )


def run(args: argparse.Namespace) -> int:
    if args.push_to_hub is None and (args.private or args.token):
        raise ValueError("--private and --token are for --push-to-hub, which is not given")
    output = Path(args.output).expanduser()
    import torch
    from transformers.utils import logging

    from dalle_torch.checkpoint.export import export_model
    from dalle_torch.checkpoint.model_card import ModelCard

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    checkpoint = export_model(
        args.source,
        output,
        step=args.step,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        processor=args.tokenizer,
        vqgan=args.vqgan,
        card=ModelCard(name=args.name or output.resolve().name, license=args.license),
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
    )
    print(f"{output}: the model of step {checkpoint.step}, from {checkpoint.url}")
    if args.push_to_hub:
        push(
            output,
            args.push_to_hub,
            f"Model after {checkpoint.step} updates",
            private=args.private or None,
            token=args.token,
        )
    return 0
