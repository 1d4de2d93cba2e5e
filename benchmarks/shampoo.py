"""What Distributed Shampoo costs beside a training step, and what its state takes.

    python benchmarks/shampoo.py                # both tables; one thread, CPU seconds, float32
    python benchmarks/shampoo.py --only memory
    python benchmarks/shampoo.py --method newton --block-size 512

Time: a DalleBart of d_model 512 with 3 + 3 layers, 47.4 million parameters, batch 8 of 64 + 256 tokens, blocks of 256,
roots every 10 steps. The floor is the time in which torch's matrix product makes the operations of a step's products,
and, for comparison, the time of oneDNN's, by which they are made on x86. Memory: the state that the optimizer
allocates, on torch's meta device, beside the formula of docs/shampoo.md.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT, IMAGE, BATCH = 64, 256, 8
ROOTS_EVERY = 10
SHARE, FLOOR = 0.25, 1.5
"""Largest share of a training step, and largest multiple of the floor, that are accepted."""


def bench_config() -> Any:
    from dalle_torch.models.configuration import DalleBartConfig

    return DalleBartConfig(
        d_model=512, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=1365, decoder_ffn_dim=1365, dropout=0.0,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_vocab_size=16384, image_vocab_size=16383,
        image_length=IMAGE, max_text_length=TEXT, use_glu=True,
    )  # fmt: skip


def published_config(name: str) -> Any:
    """DALL·E Mega's or Mini's sizes."""
    from dalle_torch.models.configuration import DalleBartConfig

    layers, width, heads, ffn, text, image = {
        "Mega": (24, 2048, 32, 4096, 50272, 16415),
        "Mini": (12, 1024, 16, 2730, 50264, 16384),
    }[name]
    return DalleBartConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_vocab_size=text, image_vocab_size=image,
        image_length=IMAGE, max_text_length=TEXT, use_glu=True, dropout=0.0,
    )  # fmt: skip


def seconds(run: Callable[[], object], repeat: int) -> float:
    """Median CPU seconds of `repeat` runs."""
    taken = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def product_rate(product: Callable[[Any, Any], Any], side: int = 2048) -> float:
    """Operations a second in a large float32 matrix product, the best of a few."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(seconds(lambda: product(a, b), 1) for _ in range(5))


def product_operations(optimizer: Any) -> int:
    """Operations of the products of a step without roots: statistics and preconditioned gradients of all blocks."""
    import math

    regions = [matrices for buckets in optimizer._buckets for bucket in buckets for matrices in bucket.matrices]
    return sum(4 * owner.used * math.prod(owner.region.sizes) * sum(owner.region.sizes) for owner in regions)


def backward(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 16384, (BATCH, TEXT), generator=generator)
    labels = torch.randint(0, 16383, (BATCH, IMAGE), generator=generator)
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()


def time_table(options: argparse.Namespace) -> list[str]:
    """Print the times; returns what is over its bound."""
    import torch

    from dalle_torch import products
    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.optim import DistributedShampoo

    model = DalleBart(bench_config())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, blocks of {options.block_size}, "
          f"roots by {options.method} every {ROOTS_EVERY} steps")  # fmt: skip
    backward(model)
    training = seconds(lambda: backward(model), options.repeat)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    adam.step()
    fused = seconds(adam.step, options.repeat)
    del adam
    skipped = [p for p in model.parameters() if max(p.shape) > 4096]
    skipped_adam = torch.optim.AdamW(skipped, lr=0.0, fused=True)
    skipped_shampoo = DistributedShampoo(skipped, lr=0.0, start_preconditioning_step=0)
    skipped_compiled = DistributedShampoo(skipped, lr=0.0, start_preconditioning_step=0, compile=True)
    ways = (skipped_adam, skipped_shampoo, skipped_compiled)
    for optimizer in ways:
        optimizer.step()
    of_skipped = [seconds(optimizer.step, options.repeat) for optimizer in ways]
    del skipped_adam, skipped_shampoo, skipped_compiled, ways, optimizer

    shampoo = DistributedShampoo(
        model.named_parameters(), lr=0.0, block_size=options.block_size, start_preconditioning_step=2,
        preconditioning_compute_steps=ROOTS_EVERY, root_method=options.method,
    )  # fmt: skip
    first = seconds(shampoo.step, 1)
    operations = product_operations(shampoo)
    floor = operations / product_rate(torch.matmul)
    # What the optimizer's own products are made of here.
    onednn = operations / product_rate(products.product) if products.available() else floor
    plain, rooted = [], []
    for _ in range(options.repeat * ROOTS_EVERY):
        kind = rooted if shampoo.roots_due else plain
        kind.append(seconds(shampoo.step, 1))
    step, with_roots = statistics.median(plain), statistics.median(rooted)
    amortised = (step * (ROOTS_EVERY - 1) + with_roots) / ROOTS_EVERY
    rows = [("loss and gradients", training), ("AdamW fused", fused), ("Shampoo, without roots", step),
            ("  floor of its products, torch's rate", floor), ("  the same, oneDNN's rate", onednn),
            ("Shampoo, with roots", with_roots), ("Shampoo, amortised", amortised),
            ("Shampoo, first step", first), ("skipped parameters, AdamW fused", of_skipped[0]),
            ("skipped parameters, Shampoo", of_skipped[1]),
            ("skipped parameters, Shampoo, compiled", of_skipped[2])]  # fmt: skip
    for name, taken in rows:
        print(f"  {name:38}{taken:8.3f} s{taken / training:8.1%} of loss and gradients")
    share = amortised / (training + amortised)
    print(f"  amortised: {amortised / training:.1%} of loss and gradients, {share:.1%} of a whole training step; "
          f"without roots: {step / floor:.2f} x the floor by torch's product, {step / onednn:.2f} x that by oneDNN's "
          f"({operations / 1e9:.1f} GFLOP)")  # fmt: skip
    failures = sum(int(state["root_failures"]) for state in shampoo.state_dict()["state"].values())
    print(f"  roots that failed: {failures}")
    problems = [f"amortised {share:.1%} of a training step"] if share > SHARE else []
    return problems + ([f"without roots {step / floor:.2f} x floor"] if step > FLOOR * floor else [])


def formula(shape: tuple[int, ...], block: int, skip: int, merge: int) -> int:
    """Bytes of a parameter's float32 state in the trainer's setting, counts apart: docs/shampoo.md."""
    import math

    from dalle_torch.optim.shampoo.blocking import merged_shape

    elements = math.prod(shape)
    if max(shape) > skip:
        return 8 * elements
    matrices = 0
    merged = merged_shape(shape, merge)
    for dim, size in enumerate(merged):
        others = math.prod(-(-other // block) for i, other in enumerate(merged) if i != dim)
        matrices += others * (size // block * block**2 + (size % block) ** 2)
    return 12 * elements + 8 * matrices


def memory_table(block_sizes: Iterable[int]) -> list[str]:
    """Print the bytes of state; returns where they differ from the formula."""
    import torch

    from dalle_torch.models.dalle_bart import DalleBart
    from dalle_torch.optim import DistributedShampoo

    print("state, bytes a parameter (float32)\n  model  M params  block  momenta int8  of this  formula  GB  AdamW")
    problems = []
    for name in ("Mega", "Mini"):
        with torch.device("meta"):
            model = DalleBart(published_config(name))
        count = sum(p.numel() for p in model.parameters())
        for block in block_sizes:
            for int8 in (False, True):
                optimizer = DistributedShampoo(
                    model.named_parameters(), block_size=block, best_effort_memory_usage_reduction=int8
                )
                optimizer.prepare()
                states = optimizer.state_dict()["state"].values()
                counts = ("step", "root_failures", "nonfinite_gradients")
                taken = sum(t.nbytes for state in states for kind, t in state.items() if kind not in counts)
                wanted = sum(formula(tuple(p.shape), block, 4096, 4096) for p in model.parameters())
                print(f"  {name}   {count / 1e6:8.0f} {block:6} {int8!s:>12} {taken / count:9.2f} "
                      f"{'' if int8 else f'{wanted / count:8.2f}':8} {taken / 1e9:6.1f}  8.00")  # fmt: skip
                if not int8 and wanted != taken:
                    problems.append(f"{name}, block {block}: {taken} bytes, formula {wanted}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median is printed")
    parser.add_argument("--method", choices=("auto", "newton", "eigh"), default="auto")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--only", choices=("time", "memory"))
    options = parser.parse_args()

    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    problems = []
    if options.only != "memory":
        problems += time_table(options)
    if options.only != "time":
        problems += memory_table((256, 512, 1024))
    if problems:
        sys.exit("over the bound: " + "; ".join(problems))


if __name__ == "__main__":
    main()
