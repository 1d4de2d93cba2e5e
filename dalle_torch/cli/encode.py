"""Turn captioned pictures into shards of VQGAN codes.

Owns: the options of the command and what it says at the end. Does not own: the work (`data.encode`), where pictures
come from (`data.sources`), the shards (`data.manifest`).
"""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_torch.data.encode import EncodeReport
    from dalle_torch.models.vqgan import VQGAN

DTYPES = ("auto", "float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Formatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="tars or parquet files (paths, URLs, 'train-{00000..00099}.tar', '*.parquet'), or a folder of them or "
        "with metadata.jsonl",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder or URL for the shards; an interrupted "
                        "run goes on where it was")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read the shards of DIR again, compare sizes and "
                        "checksums with its manifest, and encode nothing; without INPUT")  # fmt: skip
    parser.add_argument("--vqgan", default="dalle-mini/vqgan_imagenet_f16_16384", metavar="SOURCE",
                        help="hub id, folder or artifact; shapes is the embedded one")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of the VQGAN on the hub")
    parser.add_argument("--trust-pickle", action="store_true", help="read .ckpt files, which can run any code")
    parser.add_argument("--caption-key", metavar="KEY", help="JSON key or column of the captions; by default txt, "
                        "then caption, then text")  # fmt: skip
    parser.add_argument("--image-key", default="image", metavar="KEY", help="column of parquet files with the pictures")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="model whose normalised captions and token ids are "
                        "stored too, so that training need not make them")  # fmt: skip
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N",
                        help="pictures of a folder in a shard; tars and parquet files become one each")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures encoded at once")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that decode; default: as many as cores, 16 "
                        "at most")  # fmt: skip
    parser.add_argument("--max-pixels", type=int, default=1 << 26, metavar="N", help="larger pictures are skipped")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, metavar="F",
                        help="share of samples that may be unusable before the run ends with an error")  # fmt: skip
    parser.add_argument("--host-index", type=int, default=0, metavar="I", help="which host this is, from 0")
    parser.add_argument("--host-count", type=int, default=1, metavar="N", help="hosts that share INPUT and DIR; host I "
                        "takes every Nth input file")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32, on a TPU bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps or xla")


def run(args: argparse.Namespace) -> int:
    if args.verify:
        return _verify(args)
    if not args.inputs:
        raise ValueError("no INPUT is named: give tars, parquet files or a folder (or --verify to check --output)")
    from dalle_torch.cli._startup import import_models

    import_models()
    from dalle_torch.data.encode import EncodeOptions, encode
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.sources import check_captions, find_parts
    from dalle_torch.data.text import TextEncoder
    from dalle_torch.storage.embedded import located
    from dalle_torch.text import DalleBartProcessor

    if args.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {args.samples_per_shard} must be at least 1")
    options = EncodeOptions(
        batch_size=args.batch_size,
        threads=args.threads if args.threads is not None else min(os.cpu_count() or 1, 16),
        max_pixels=args.max_pixels,
        max_bad_fraction=args.max_bad_fraction,
        host_index=args.host_index,
        host_count=args.host_count,
        caption_key=args.caption_key,
    )
    # Mistakes in names come to light before weights are loaded.
    parts = find_parts(args.inputs, args.caption_key, args.image_key, args.samples_per_shard)
    check_captions(parts)
    folder = ShardFolder(args.output)
    processor = None if args.tokenizer is None else DalleBartProcessor.from_pretrained(located(args.tokenizer))
    text = None if processor is None else TextEncoder(processor)
    vqgan = _load_vqgan(args)
    report = encode(parts, folder, vqgan, text, options)
    _print(report, folder)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.verify import verify

    if args.inputs:
        raise ValueError(f"--verify compares the shards of --output with its own manifest: leave out {args.inputs[0]}")
    found = verify(ShardFolder(args.output))
    state = "complete" if found.complete else "not complete yet"
    print(
        f"{args.output}: {found.shards:,} shards ({found.bytes:,} bytes) are what the manifest says; it is {state}, "
        f"with {found.samples:,} samples"
    )
    return 0


def _load_vqgan(args: argparse.Namespace) -> "VQGAN":
    import torch

    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.parallel.runtime import pick_device
    from dalle_torch.storage.embedded import located_vqgan

    device = pick_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "xla" else "float32"
    source = located_vqgan(args.vqgan)
    vqgan = VQGAN.from_pretrained(source, dtype=dtype, revision=args.revision, trust_pickle=args.trust_pickle)
    return vqgan.eval().to(device=device, memory_format=torch.channels_last)


def _print(report: "EncodeReport", folder: object) -> None:
    assert report.manifest is not None
    seconds = max(report.seconds, 1e-9)
    if report.samples:
        print(
            f"{report.samples:,} pictures in {report.shards} shards in {report.seconds:.1f} s: "
            f"{report.samples / seconds:.1f} images/s, {report.network_seconds / seconds:.0%} of the time in the VQGAN"
        )
    state = "complete" if report.manifest.complete else "not complete yet: other hosts are at work, or still to come"
    print(f"{folder}: {report.manifest.samples:,} samples in {len(report.manifest.shards)} shards, {state}")
    for reason, count in report.manifest.skipped.items():
        print(f"skipped {count:,}: {reason}")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


_EPILOG = """\
Each input file becomes one shard DIR/NAME.tar with KEY.txt (the caption), KEY.npy (the codes, uint16) and KEY.json
(width, height, source and what the input said); DIR/manifest.json has counts, sizes, checksums and every skipped sample
by reason. A shard appears when it is whole: after an interruption the same command goes on.

  dalle-torch encode 'cc12m/{00000..01242}.tar' --output tokens --tokenizer dalle-mini/dalle-mini
  dalle-torch encode photos/ --output tokens --vqgan shapes
  dalle-torch encode --output tokens --verify
  dalle-torch encode 'gs://bucket/*.parquet' --output gs://bucket/tokens --host-index 3 --host-count 8 --device xla
"""
