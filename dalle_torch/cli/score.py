"""Score how well each sample's picture shows its caption, for training to filter by and for explore to look at.

Owns: the options of the command, its processes, what it says at the end. Does not own: the work (`data.scoring`).
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_torch.data.scoring import ScoringOptions, ShardScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Shards are written anew into DIR, one at a time and whole or not at all, with clip_score in each sample's "
        "JSON or as a column of parquet files: an interrupted run goes on. Codes stay codes: train on DIR with "
        "data.min_clip_score."
    )
    parser.add_argument("inputs", nargs="+", metavar="SHARDS", help="tars or parquet files of pictures or of "
                        "codes (paths, URLs, patterns), or a folder of them")  # fmt: skip
    parser.add_argument("--clip", required=True, metavar="JUDGE", help="a CLIP model's hub id or folder, "
                        "open_clip:ARCHITECTURE:FILE, or shapes for captions of shapes")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder or URL for the scored shards")
    parser.add_argument("--vqgan", metavar="SOURCE", default="dalle-mini/vqgan_imagenet_f16_16384", help="what decodes "
                        "shards of codes: hub id, folder or artifact; shapes is the embedded one")  # fmt: skip
    parser.add_argument("--key", default="clip_score", help="JSON key or column of the score; training filters by "
                        "clip_score")  # fmt: skip
    parser.add_argument("--caption-key", metavar="KEY", help="JSON key or column of the captions")
    parser.add_argument("--image-key", default="image", metavar="KEY", help="column of parquet files with the pictures")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, metavar="F", help="share of samples that may be "
                        "unusable before the run ends with an error")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the shards")
    parser.add_argument("--host-index", type=int, default=0, metavar="I", help="which host this is, from 0")
    parser.add_argument("--host-count", type=int, default=1, metavar="N", help="hosts that share SHARDS and DIR; "
                        "host I takes every Nth shard")  # fmt: skip
    parser.add_argument(
        "--trust-pickle", action="store_true", help="read .ckpt files of a VQGAN, which can run any code"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")


def run(args: argparse.Namespace) -> int:
    from dalle_torch.cli._startup import import_models

    import_models(image_processors=True)
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.scoring import find_scorable, finish_manifest

    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    _options(args, args.host_index, args.host_count)
    folder = ShardFolder(args.output)
    shards = find_scorable(args.inputs, folder)
    mine = len(shards[args.host_index :: args.host_count])
    jobs = min(args.jobs, max(mine, 1))
    if jobs == 1:
        found = _work(args, args.host_index, args.host_count)
    else:
        # Each as if it were a host of its own among all processes of all hosts.
        places = [(args, args.host_index + args.host_count * job, args.host_count * jobs) for job in range(jobs)]
        with get_context("spawn").Pool(jobs) as pool:
            found = [result for part in pool.starmap(_work, places) for result in part]
    finish_manifest(shards, folder)
    _print(found, args)
    return 0


def _work(args: argparse.Namespace, index: int, count: int) -> "list[ShardScores]":
    """One process's share."""
    os.environ.setdefault("USE_TORCH_XLA", "0")
    import torch

    from dalle_torch.data.captioned import holds_codes
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.scoring import find_scorable, score_shards
    from dalle_torch.data.vqgan_match import check_made_by
    from dalle_torch.evaluation.loading import load_scorer
    from dalle_torch.parallel.runtime import pick_device

    if args.jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    device = pick_device(args.device)
    folder = ShardFolder(args.output)
    shards = find_scorable(args.inputs, folder)
    vqgan = _load_vqgan(args, device) if holds_codes(args.inputs) else None
    if vqgan is not None:
        check_made_by(args.inputs, vqgan, f"--vqgan {args.vqgan}")
    scorer = load_scorer(args.clip, device=device)
    return score_shards(shards, folder, scorer, vqgan, _options(args, index, count))


def _options(args: argparse.Namespace, index: int, count: int) -> "ScoringOptions":
    from dalle_torch.data.scoring import ScoringOptions

    return ScoringOptions(
        key=args.key, caption_key=args.caption_key, image_key=args.image_key, max_bad_fraction=args.max_bad_fraction,
        host_index=index, host_count=count,
    )  # fmt: skip


def _load_vqgan(args: argparse.Namespace, device: Any) -> Any:
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.storage.embedded import located_vqgan

    return VQGAN.from_pretrained(located_vqgan(args.vqgan), trust_pickle=args.trust_pickle).eval().to(device)


def _print(found: "Sequence[ShardScores]", args: argparse.Namespace) -> None:
    samples = sum(result.samples for result in found)
    print(f"{samples:,} samples of {len(found)} shards have {args.key} in {args.output}")
    if samples:
        mean = sum(result.total for result in found) / samples
        scored = [result for result in found if result.samples]
        low, high = min(result.lowest for result in scored), max(result.highest for result in scored)
        print(f"mean {mean:.4f}, from {low:.4f} to {high:.4f}; dalle-torch explore {args.output} shows thresholds")
    reasons: Counter[str] = Counter()
    for result in found:
        reasons.update({reason: len(keys) for reason, keys in result.skipped.items()})
    for reason, count in sorted(reasons.items()):
        print(f"skipped {count:,}: {reason}")
    if found and not found[0].judge["standard"]:
        print(f"note: scores by {found[0].judge['name']} ({args.clip}) are not CLIP's: compare them with its own")
