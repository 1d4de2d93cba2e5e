"""Speed and memory of the data: encoding pictures to shards, and loading those shards.

    python -m benchmarks.data                          # everything: some minutes
    python -m benchmarks.data --only loader            # or memory, encode
    python -m benchmarks.data --only encode --input '/path/{00000..00003}.tar' --pictures 24

Shards, captions (made-up words with Zipf's frequencies, a quarter of them with capitals, numbers, quotes and the like)
and a tokenizer trained on them are made first. The loader runs in one process; samples a second are those of a second
of that process's CPU time, the whole way to tensors. Memory is the resident size of the process, of which the page
cache is no part.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

IMAGE_LENGTH, CODEBOOK, TEXT_LENGTH = 256, 16384, 64
SAMPLES, SHARDS = 20_000, 4
BATCH = 256
BOUNDS = {"tokenised while reading": 3_000, "tokenised by encode": 20_000}
ENCODE_BOUND = 0.9
MEMORY_SAMPLES, MEMORY_BOUND = 200_000, 1.05


def words(count: int = 20_000) -> list[str]:
    draw = np.random.default_rng(0)
    syllables = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    return ["".join(draw.choice(syllables, draw.integers(1, 4))) for _ in range(count)]


def captions(count: int) -> list[str]:
    draw = np.random.default_rng(1)
    vocabulary = words()
    share = 1 / np.arange(1, len(vocabulary) + 1)
    lengths = draw.integers(6, 17, count)
    chosen = iter(draw.choice(len(vocabulary), lengths.sum(), p=share / share.sum()).tolist())
    found = []
    for index, length in enumerate(lengths.tolist()):
        caption = " ".join(vocabulary[next(chosen)] for _ in range(length))
        if index % 4 == 0:
            caption = f'{caption.title()}, "{index % 97}-year-old" &amp; co. (photo: 1,{index % 1000:03d}) — café'
        found.append(caption)
    return found


def make_processor(texts: list[str]) -> "DalleBartProcessor":  # noqa: F821 (imported late: it is heavy)
    """As that of the published models: normalised captions, byte-level BPE, 64 tokens."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    from dalle_torch.text import DalleBartProcessor, DalleBartTokenizer, TextNormalizer

    backend = Tokenizer(BPE(fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = BpeTrainer(
        vocab_size=30_000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = DalleBartTokenizer(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return DalleBartProcessor(tokenizer, TextNormalizer(), TEXT_LENGTH)


def write_shards(folder: Path, texts: list[str], text: "TextEncoder") -> None:  # noqa: F821
    """As `encode` writes them, with token ids and without, and the original project's parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dalle_torch.data.manifest import Settings, ShardFolder, ShardRecord
    from dalle_torch.data.sources import RawSample
    from dalle_torch.data.token_shard import PicturedSample, TokenShardWriter, text_members

    codes = np.random.default_rng(2).integers(0, CODEBOOK, (len(texts), IMAGE_LENGTH))
    size = len(texts) // SHARDS
    for kind, encoder in (("tar", None), ("tokens", text)):
        output = ShardFolder(str(folder / kind))
        for first in range(0, len(texts), size):
            name = f"{first:06d}.tar"
            samples = []
            for index in range(first, first + size):
                sample = RawSample(f"{index:09d}", b"", texts[index], {"clip_score": 0.3, "url": "https://example.com"})
                members = text_members(sample, name, (640, 480), encoder)
                samples.append(PicturedSample(sample.key, np.zeros(0), members))
            with output.writing(name) as path, TokenShardWriter(path) as shard:
                shard.write(samples, codes[first : first + size])
            length = (folder / kind / name).stat().st_size
            output.write_record(
                ShardRecord(name=name, source=name, samples=size, bytes=length, sha256="", offsets=shard.offsets)
            )
        output.write_manifest(
            Settings(vqgan="", resolution=256, image_length=IMAGE_LENGTH, codebook_size=CODEBOOK, dtype="float32",
                     text=None if encoder is None else encoder.fingerprint), [],
        )  # fmt: skip
    (folder / "parquet").mkdir()
    pq.write_table(pa.table({"caption": texts, "encoding": list(codes)}), folder / "parquet" / "0.parquet")


def make_loader(folder: Path, text: "TextEncoder") -> "TokenLoader":  # noqa: F821
    from dalle_torch.config import DataConfig
    from dalle_torch.data.datasets import TokenData

    config = DataConfig(train=[str(folder)], workers=0, lanes=8, shuffle_buffer=8192, blank_caption_prob=0.1)
    data = TokenData(
        config=config, text=text, image_length=IMAGE_LENGTH, codebook_size=CODEBOOK, batch_size=BATCH
    )  # fmt: skip
    return data.training_loader()


def samples_a_second(loader: "TokenLoader", samples: int) -> float:  # noqa: F821
    """Of CPU time, after the first batch has filled the shuffle buffer."""
    batches = iter(loader)
    next(batches)
    started, rows = time.process_time(), 0
    while rows < samples:
        rows += len(next(batches).labels)
    return rows / (time.process_time() - started)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_loader(folder: Path, text: "TextEncoder", repeat: int) -> list[bool]:  # noqa: F821
    print("\n| captions | samples a second of a core | bound |\n| --- | --- | --- |")
    passed = []
    cases = [("tokenised while reading", "tar", 20_000), ("tokenised while reading, parquet", "parquet", 20_000),
             ("tokenised by encode", "tokens", 60_000)]  # fmt: skip
    for name, kind, samples in cases:
        rate = max(samples_a_second(make_loader(folder / kind, text), samples) for _ in range(repeat))
        bound = BOUNDS.get(name.removesuffix(", parquet"), 0)
        passed.append(rate >= bound)
        print(f"| {name} | {rate:,.0f} | {bound:,} |", flush=True)
    return passed


def measure_memory(folder: Path, text: "TextEncoder") -> bool:  # noqa: F821
    """Resident size after a tenth of the samples and at the end."""
    rows = early = peak = 0
    for batch in make_loader(folder / "tokens", text):
        rows += len(batch.labels)
        if rows >= MEMORY_SAMPLES // 10:
            early = early or resident()
            peak = max(peak, resident())
        if rows >= MEMORY_SAMPLES:
            break
    print(
        f"\nmemory: {early / 2**20:,.0f} MB after {MEMORY_SAMPLES // 10:,} samples, at most {peak / 2**20:,.0f} MB up "
        f"to {rows:,}: {peak / early:.3f} times as much (bound {MEMORY_BOUND})"
    )
    return peak <= MEMORY_BOUND * early


def photographs(folder: Path, count: int) -> str:
    """A tar of JPEGs of 480 x 360 pixels, with what photographs have of detail."""
    import io

    from PIL import Image
    from webdataset.writer import TarWriter

    draw = np.random.default_rng(3)
    path = folder / "photographs.tar"
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False)
        for index in range(count):
            layers = [Image.fromarray(draw.integers(0, 256, (n * 3, n * 4, 3), dtype=np.uint8)) for n in (3, 12, 120)]
            large = [np.asarray(layer.resize((480, 360), Image.Resampling.BICUBIC), np.float32) for layer in layers]
            picture = np.average(large, axis=0, weights=(6, 3, 1)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=90)
            writer.write({"__key__": f"{index:06d}", "jpg": buffer.getvalue(), "txt": f"picture {index}".encode()})
        writer.close()
    return str(path)


def measure_encode(folder: Path, source: str | None, pictures: int, text: "TextEncoder") -> bool:  # noqa: F821
    """At the published network's size, with random weights."""
    import torch

    from dalle_torch import VQGAN, VQGANConfig
    from dalle_torch.data.encode import EncodeOptions, encode
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.sources import find_parts

    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig()).eval().to(memory_format=torch.channels_last)
    parts = find_parts([source or photographs(folder, pictures)], None, "image", 10_000)
    report = encode(parts, ShardFolder(str(folder / "encoded")), vqgan, text, EncodeOptions(batch_size=8, threads=1))
    share = report.network_seconds / report.seconds
    rate = report.samples / report.seconds
    print(
        f"\nencode: {report.samples} pictures in {report.seconds:.1f} s, {rate:.2f} a second, {share:.1%} of the time "
        f"in the VQGAN (bound {ENCODE_BOUND:.0%})"
    )
    return share >= ENCODE_BOUND


def results(args: argparse.Namespace, folder: Path) -> Iterator[bool]:
    from dalle_torch.data.text import TextEncoder

    texts = captions(SAMPLES)
    text = TextEncoder(make_processor(texts))
    if args.only in (None, "loader", "memory"):
        write_shards(folder, texts, text)
        print(f"{SAMPLES:,} samples in {SHARDS} shards, {text.vocabulary:,} tokens; such as {texts[0]!r}")
    if args.only in (None, "loader"):
        yield from measure_loader(folder, text, args.repeat)
    if args.only in (None, "memory"):
        yield measure_memory(folder, text)
    if args.only in (None, "encode"):
        yield measure_encode(folder, args.input, args.pictures, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("loader", "memory", "encode"))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each loader, of which the fastest counts")
    parser.add_argument("--input", help="tars to encode instead of pictures that are made")
    parser.add_argument("--pictures", type=int, default=24, help="pictures that are made to be encoded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        passed = list(results(args, Path(name)))
    print("\nevery bound is met" if all(passed) else "\nSOME BOUND IS MISSED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
