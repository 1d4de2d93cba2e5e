"""Decoding and encoding with a VQGAN of f16-16384 size, against taming-transformers' own networks.

    python benchmarks/vqgan.py                          # one thread, CPU seconds
    python benchmarks/vqgan.py --threads 2 --pictures 4

Weights are random. Both run interleaved in one process on the same weights; medians are printed, the largest
difference of their outputs, and the multiple of the floor: the time in which this machine's matrix product makes the
operations that taming's network takes (its convolutions done directly).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIMIT = 1e-3
"""Largest difference of pixels that is accepted."""


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> tuple[float, object]:
    start = clock()
    result = run()
    return clock() - start, result


def product_rate(clock: Callable[[], float], side: int = 2048) -> float:
    """Operations a second in a large float32 matrix product, the best of a few."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(seconds(lambda: a @ b, clock)[0] for _ in range(5))


def compare(
    title: str, ours: Callable[[], object], theirs: Callable[[], object], repeat: int, clock: Callable[[], float]
) -> float:
    """Print a table of both; returns the largest difference."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        theirs()
    floor = counter.get_total_flops() / product_rate(clock)
    first, _ = seconds(ours, clock)
    runs: dict[str, list[float]] = {"taming-transformers": [], "dalle_torch": []}
    difference = 0.0
    for _ in range(repeat):
        taken, expected = seconds(theirs, clock)
        runs["taming-transformers"].append(taken)
        taken, found = seconds(ours, clock)
        runs["dalle_torch"].append(taken)
        assert isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
        difference = max(difference, (expected - found).abs().max().item())
    middle = {name: statistics.median(times) for name, times in runs.items()}
    print(f"{title}: {counter.get_total_flops() / 1e9:.1f} GFLOP done directly, floor {floor:.2f} s")
    for name, taken in middle.items():
        spread = f"{min(runs[name]):.2f}-{max(runs[name]):.2f}"
        print(f"  {name:22}{taken:8.2f} s  ({spread}){taken / floor:8.2f} x floor")
    print(f"  ratio {middle['taming-transformers'] / middle['dalle_torch']:.2f}, first call {first:.2f} s, "
          f"largest difference {difference:.1e} of values with deviation {expected.std():.2f}")  # fmt: skip
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=1, help="pictures in a batch")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median is printed")
    parser.add_argument("--wall", action="store_true", help="wall time instead of CPU time")
    options = parser.parse_args()

    import torch

    from dalle_torch.models.configuration import VQGANConfig
    from dalle_torch.models.vqgan import VQGAN

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    model = VQGAN(VQGANConfig()).eval()
    side = model.config.latent_size
    codes = torch.randint(model.config.n_embed, (options.pictures, side**2))
    pixels = torch.rand(options.pictures, 3, model.config.resolution, model.config.resolution) * 2 - 1
    latents = model.codebook.detach()[codes].view(-1, side, side, model.config.embed_dim).permute(0, 3, 1, 2)
    kind = "wall" if options.wall else "CPU"
    print(f"{options.pictures} picture(s), {options.threads} thread(s), {kind} time, float32")
    with torch.no_grad():
        difference = compare(
            "decode",
            lambda: model.decode(codes),
            lambda: model.decoder(model.post_quant_conv(latents)),
            options.repeat,
            clock,
        )
        compare(
            "encoder",
            lambda: model._run(model.encoder, pixels),
            lambda: model.encoder(pixels),
            options.repeat,
            clock,
        )
    if difference > LIMIT:
        sys.exit(f"pixels differ by {difference:.1e}, more than {LIMIT:.0e}")


if __name__ == "__main__":
    main()
