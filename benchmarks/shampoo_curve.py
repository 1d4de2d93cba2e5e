"""Loss against steps and against seconds, AdamW beside Distributed Shampoo, on captioned shapes.

    python benchmarks/shampoo_curve.py --output docs/shampoo.png

Trains the embedded model's network from the same start on the same batches with each optimizer and learning rate that
is named, in CPU seconds of one thread, and draws the best of each (matplotlib is needed for the picture). The loss is a
running mean over 20 batches that were not seen before.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ASSETS = ROOT / "dalle_torch" / "assets" / "shapes"
WINDOW = 20


def make_data(scenes: int, batch_size: int) -> list[dict[str, Any]]:
    """Batches of captioned shapes, each picture once."""
    from itertools import islice

    from dalle_torch.config import DataConfig, ShapesDataConfig
    from dalle_torch.data.datasets import TokenData
    from dalle_torch.data.encode import EncodeOptions, encode
    from dalle_torch.data.manifest import ShardFolder
    from dalle_torch.data.scenes import scene_parts
    from dalle_torch.data.text import TextEncoder
    from dalle_torch.models.vqgan import VQGAN
    from dalle_torch.text.processor import DalleBartProcessor

    vqgan = VQGAN.from_pretrained(ASSETS / "vqgan").eval()
    text = TextEncoder(DalleBartProcessor.from_pretrained(ASSETS))
    with tempfile.TemporaryDirectory() as folder:
        parts = scene_parts(ShapesDataConfig(scenes=scenes))
        encode(parts, ShardFolder(folder), vqgan, text, EncodeOptions(batch_size=16, threads=1))
        data = TokenData(
            config=DataConfig(train=[folder], workers=0, blank_caption_prob=0.1),
            text=text,
            image_length=vqgan.config.image_length,
            codebook_size=vqgan.config.n_embed,
            batch_size=batch_size,
        )
        return [batch.inputs for batch in islice(data.training_loader(), scenes // batch_size)]


def train(
    kind: str, peak: float, dataset: list[dict[str, Any]], steps: int, threads: int
) -> list[tuple[int, float, float]]:
    """(step, CPU seconds, loss) of a run; data is not counted."""
    import torch

    from dalle_torch.config import OptimizerConfig, ShampooConfig
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.optim.build import build_optimizer
    from dalle_torch.optim.schedules import learning_rate
    from dalle_torch.training.step import train_step

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DalleBart(DalleBartConfig.from_pretrained(ASSETS)).train()
    config = OptimizerConfig(
        name="shampoo" if kind == "shampoo" else "adamw",
        lr=peak,
        warmup_steps=50,
        schedule="cosine",
        final_lr=peak / 100,
        beta2=0.98,
        # Roots from the first steps on: the runs are short.
        shampoo=ShampooConfig(block_size=256, start_preconditioning_step=25) if kind == "shampoo" else None,
    )
    optimizer = build_optimizer(model, config)
    found, seconds = [], 0.0
    for step in range(steps):
        batch = dataset[step]
        start = time.process_time()
        metrics = train_step(model, optimizer, [batch], lr=learning_rate(config, step, steps), max_grad_norm=1.0)
        seconds += time.process_time() - start
        found.append((step + 1, seconds, float(metrics["loss"])))
        if (step + 1) % 50 == 0:
            loss = smoothed(found)[-1][2]
            print(f"  {kind} lr {peak:g}: step {step + 1}, {seconds:.0f} s, loss {loss:.3f}", flush=True)
    return found


def smoothed(rows: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    losses = [loss for _, _, loss in rows]
    means = [sum(losses[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(losses))]
    return [(step, seconds, mean) for (step, seconds, _), mean in zip(rows, means, strict=True)]


def draw(best: dict[str, tuple[float, list[tuple[int, float, float]]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for kind, (peak, rows) in best.items():
        label = f"{'Shampoo' if kind == 'shampoo' else 'AdamW'}, lr {peak:g}"
        steps, seconds, losses = zip(*smoothed(rows)[WINDOW:], strict=True)
        left.plot(steps, losses, label=label)
        right.plot(seconds, losses, label=label)
    left.set(xlabel="steps", ylabel=f"loss (mean of {WINDOW} batches)")
    right.set(xlabel="CPU seconds of training, one thread")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--adamw", type=float, nargs="*", default=[3e-3, 6e-3, 1e-2], help="highest learning rates")
    parser.add_argument("--shampoo", type=float, nargs="*", default=[2e-3, 3e-3, 6e-3], help="highest learning rates")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="JSON file that runs are kept in, and taken from")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    options = parser.parse_args()

    kept = json.loads(options.rows.read_text()) if options.rows and options.rows.is_file() else {}
    dataset = None
    best: dict[str, tuple[float, list[tuple[int, float, float]]]] = {}
    for kind in ("adamw", "shampoo"):
        for peak in getattr(options, kind):
            key = f"{kind} {peak:g} {options.steps}"
            if key not in kept:
                # Every batch of a run is new.
                dataset = dataset or make_data(options.steps * options.batch_size, options.batch_size)
                kept[key] = train(kind, peak, dataset, options.steps, options.threads)
                if options.rows:
                    options.rows.write_text(json.dumps(kept))
            rows = [(int(step), float(seconds), float(loss)) for step, seconds, loss in kept[key]]
            final = smoothed(rows)[-1]
            print(f"{kind:8} lr {peak:g}: loss {final[2]:.4f} after {final[0]} steps, {final[1]:.0f} s")
            if kind not in best or final[2] < smoothed(best[kind][1])[-1][2]:
                best[kind] = (peak, rows)
    draw(best, options.output)


if __name__ == "__main__":
    main()
