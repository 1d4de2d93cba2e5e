"""Look at a data set: scores and what thresholds keep, samples along the scale, captions, words, duplicates.

Owns: the options of the command and what it says at the end. Does not own: the study (`studies.explore`).
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dalle_torch.cli.generate import writable_folder

if TYPE_CHECKING:
    from dalle_torch.studies.explore import Decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="SHARDS", help="tars of pictures or of codes, parquet files of "
                        "pictures, a folder of them or with metadata.jsonl; dalle-torch score adds scores")  # fmt: skip
    parser.add_argument("--output", default="explore", metavar="DIR", help="folder for explore.html, explore.json and "
                        "samples.csv")  # fmt: skip
    parser.add_argument("--key", default="clip_score", help="of the score in each sample's JSON")
    parser.add_argument("--caption-key", metavar="KEY", help="JSON key or column of the captions")
    parser.add_argument("--vqgan", metavar="SOURCE", help="shows codes as pictures: hub id, folder or artifact; shapes "
                        "is the embedded one")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="SOURCE", help="model whose tokens of captions are counted")
    parser.add_argument("--trust-pickle", action="store_true", help="read .ckpt files, which can run any code")


def run(args: argparse.Namespace) -> int:
    from dalle_torch.cli._startup import import_models

    import_models()
    from dalle_torch.studies.explore import explore

    decode = None if args.vqgan is None else _decoder(args)
    with writable_folder(args.output) as folder:
        result = explore(
            args.inputs, folder, score_key=args.key, caption_key=args.caption_key, decode=decode,
            count_tokens=None if args.tokenizer is None else _token_counter(args.tokenizer),
        )  # fmt: skip
    print(f"{result['samples']:,} samples, mean caption of {result['caption_words']['mean']:.1f} words")
    for reason, count in result["skipped"].items():
        print(f"skipped {count:,}: {reason}")
    equal, near = result["equal_pictures"], result["near_pictures"] or result["near_codes"]
    what = "rows of codes" if result["near_codes"] else "pictures"
    print(
        f"{result['equal_captions']:,} captions and {equal['samples']:,} {what} repeat an earlier one"
        + (f", {near['pairs']:,} pairs of {what} look alike" if near else "")
    )
    if scores := result["scores"]:
        print(f"scores: mean {scores['mean']:.4f}, from {scores['min']:.4f} to {scores['max']:.4f}")
        for row in result["thresholds"][::4]:
            print(f"  min_clip_score {row['min_clip_score']:<10.4g} keeps {row['samples']:>10,} ({row['share']:.1%})")
    else:
        print("no scores: dalle-torch score adds them")
    print(f"{folder}{os.sep}explore.html shows it; samples.csv has a line a sample")
    return 0


def _decoder(args: argparse.Namespace) -> "Decode":
    import numpy as np
    import torch

    from dalle_torch.data.captioned import holds_codes
    from dalle_torch.data.vqgan_match import check_made_by
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.storage.embedded import located_vqgan

    vqgan = VQGAN.from_pretrained(located_vqgan(args.vqgan), trust_pickle=args.trust_pickle).eval()
    if holds_codes(args.inputs):
        check_made_by(args.inputs, vqgan, f"--vqgan {args.vqgan}")

    @torch.no_grad()
    def decode(codes: Sequence[Any]) -> list[Any]:
        size, length = vqgan.config.n_embed, vqgan.config.image_length
        for row in codes:
            if len(row) != length or not 0 <= int(row.min()) <= int(row.max()) < size:
                raise ValueError(
                    f"the data has pictures of {len(row)} codes up to {int(row.max())}, and --vqgan {args.vqgan} makes "
                    f"{length} below {size}: name the VQGAN that they were encoded with"
                )
        parts = torch.from_numpy(np.stack(codes)).split(16)
        return [image for part in parts for image in vqgan.pixels_to_images(vqgan.decode(part))]

    return decode


def _token_counter(source: str) -> Any:
    from dalle_torch.data.text import TextEncoder
    from dalle_torch.storage.embedded import located
    from dalle_torch.text import DalleBartProcessor

    encoder = TextEncoder(DalleBartProcessor.from_pretrained(located(source)))
    return lambda caption: len(encoder([caption])[0])
