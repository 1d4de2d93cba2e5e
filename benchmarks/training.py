"""A training step: loss and gradients beside transformers' BART, and what the rest of the step costs.

    python benchmarks/training.py                        # one thread, CPU seconds; two minutes
    python benchmarks/training.py --wall --threads 2
    python benchmarks/training.py --only bart --compile  # compiles for some minutes

All in one process and in turn; medians are printed. d_model 512, 3 + 3 layers, 8 heads, two vocabularies of 16384,
batch 8 of 64 text tokens (prompts of 16 to 64, padded) and 256 image tokens, no dropout, random weights.

Beside BART in two settings: the model as it is used, with gated units of 1365, whose three matrices hold what BART's
two of 2048 hold, and with the plain feed-forward part and biases that BART has, at the same 2048. BART is
`BartForConditionalGeneration` with a text vocabulary of its own beside the image vocabulary, untied, and attention by
scaled_dot_product_attention as ours; both compute their own loss, the mean cross entropy of 2048 image tokens. The
model is also timed with torch's own matrix product instead of oneDNN's, which is what BART's products go through.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

WIDTH, LAYERS, HEADS, GLU, FFN = 512, 3, 8, 1365, 2048
VOCABULARY, TEXT, IMAGE, BATCH = 16384, 64, 256, 8
ROOTS_EVERY = 10
BLOCK = 256
BOUND = 1.0
"""Least ratio of BART's time to ours that is accepted."""

Run = Callable[[], float]


def dalle_bart(glu: bool = True) -> nn.Module:
    """The model; without `glu` with BART's feed-forward part and biases."""
    from dalle_torch.models.configuration import DalleBartConfig
    from dalle_torch.models.dalle_bart import DalleBart

    inner = GLU if glu else FFN
    config = DalleBartConfig(
        d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=inner, decoder_ffn_dim=inner, encoder_vocab_size=VOCABULARY,
        image_vocab_size=VOCABULARY - 1, image_length=IMAGE, max_text_length=TEXT, use_glu=glu, use_bias=not glu,
        dropout=0.0,
    )  # fmt: skip
    return DalleBart(config).train()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN,
        max_position_embeddings=IMAGE, dropout=0.0, attn_implementation="sdpa", tie_word_embeddings=False,
        use_cache=False, pad_token_id=0, decoder_start_token_id=VOCABULARY - 1,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).train()
    # Untied, encoder and decoder have tables of their own already; the shared one is read by nobody.
    del model.model.shared
    return model


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (BATCH, TEXT), generator=generator)
    lengths = torch.linspace(TEXT // 4, TEXT, BATCH).long()
    labels = torch.randint(4, VOCABULARY - 1, (BATCH, IMAGE), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(TEXT) < lengths[:, None]).long(), "labels": labels}


def gradients(model: Callable[..., Any], parameters: Iterable[nn.Parameter], half: bool = False) -> Run:
    """What computes loss and gradients, and returns the loss; `half`: mixed precision with bfloat16."""
    batch, parameters = make_batch(), list(parameters)

    def run() -> float:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        return loss.item()

    return run


def with_torchs_product(run: Run) -> Run:
    def plain() -> float:
        with torch.backends.mkldnn.flags(enabled=False):
            return run()

    return plain


def medians(runs: Mapping[str, Run], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, in turn, after one run of each that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeat + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if round_number:
                taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def beside_bart(options: argparse.Namespace, clock: Callable[[], float]) -> list[str]:
    """Print the table of loss and gradients; returns what is over its bound."""
    theirs, models = bart(), {"gated": dalle_bart(), "plain": dalle_bart(glu=False)}
    for name, model in {"BART": theirs, **models}.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    runs: dict[str, Run] = {"BART": gradients(theirs, theirs.parameters())}
    for name, model in models.items():
        runs[f"ours, {name}"] = gradients(model, model.parameters())
        runs[f"ours, {name}, torch's product"] = with_torchs_product(runs[f"ours, {name}"])
    ours = models["gated"]
    runs["BART, bfloat16"] = gradients(theirs, theirs.parameters(), half=True)
    runs["ours, gated, bfloat16"] = gradients(ours, ours.parameters(), half=True)
    if options.compile:
        runs["BART, compiled"] = gradients(torch.compile(theirs), theirs.parameters())
        runs["ours, gated, compiled"] = gradients(torch.compile(ours), ours.parameters())
    taken = medians(runs, options.repeat, clock)
    print("\n| loss and gradients | s | BART's time / this |\n| --- | --- | --- |")
    problems = []
    for name, seconds in taken.items():
        peer = next((f"BART, {kind}" for kind in ("bfloat16", "compiled") if kind in name), "BART")
        ratio = taken[peer] / seconds
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} |")
        if ratio < BOUND and name in ("ours, gated", "ours, plain"):
            problems.append(f"{name}: {1 / ratio:.2f} times BART's time")
    return problems


def whole_step(options: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Print what checkpointing and the optimizers add to loss and gradients."""
    from dalle_torch.optim import DistributedShampoo

    model, saving = dalle_bart(), dalle_bart()
    saving.activation_checkpointing_enable()
    runs = {"plain": gradients(model, model.parameters()), "checkpointed": gradients(saving, saving.parameters())}
    taken = medians(runs, options.repeat, clock)
    del saving, runs
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    optimizer_time = {"AdamW, fused": medians({"step": lambda: adamw.step() or 0.0}, options.repeat, clock)["step"]}
    adamw.state.clear()
    shampoo = DistributedShampoo(
        model.named_parameters(), lr=0.0, block_size=BLOCK, start_preconditioning_step=2,
        preconditioning_compute_steps=ROOTS_EVERY,
    )  # fmt: skip
    shampoo.step()
    plain: list[float] = []
    rooted: list[float] = []
    for _ in range(ROOTS_EVERY * 2):
        kind = rooted if shampoo.roots_due else plain
        start = clock()
        shampoo.step()
        kind.append(clock() - start)
    mean = (statistics.median(plain) * (ROOTS_EVERY - 1) + statistics.median(rooted)) / ROOTS_EVERY
    optimizer_time[f"Shampoo, blocks of {BLOCK}, roots every {ROOTS_EVERY} steps"] = mean
    print("\n| whole step | loss and gradients, s | optimizer, s | its share | samples/s |")
    print("| --- | --- | --- | --- | --- |")
    for layers in ("plain", "checkpointed"):
        for name, seconds in optimizer_time.items():
            total = taken[layers] + seconds
            label = name if layers == "plain" else f"{name}; layers checkpointed"
            print(f"| {label} | {taken[layers]:.3f} | {seconds:.3f} | {seconds / total:.1%} | {BATCH / total:.2f} |")
    print(f"\ngradient checkpointing: {taken['checkpointed'] / taken['plain']:.2f} times loss and gradients")


def peak_table() -> None:
    """Print the memory that three steps of loss and gradients take at most, each in a process of its own."""
    print("\n| peak above the model | MB |\n| --- | --- |")
    for name in ("bart", "ours", "checkpointed"):
        result = subprocess.run(
            [sys.executable, __file__, "--peak", name], check=True, capture_output=True, text=True
        )  # fmt: skip
        print(f"| {name} | {float(result.stdout.split()[-1]):,.0f} |", flush=True)


def peak(name: str) -> None:
    """Print by how many MB the resident size of this process grows at most."""
    torch.set_num_threads(1)
    model = bart() if name == "bart" else dalle_bart()
    if name == "checkpointed":
        model.activation_checkpointing_enable()
    before = _status("VmRSS")
    run = gradients(model, model.parameters())
    for _ in range(3):
        run()
    print(_status("VmHWM") - before)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median is printed")
    parser.add_argument("--wall", action="store_true", help="wall time instead of CPU time")
    parser.add_argument("--compile", action="store_true", help="torch.compile of both too")
    parser.add_argument("--only", choices=("bart", "step", "memory"))
    parser.add_argument("--peak", choices=("bart", "ours", "checkpointed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak(options.peak)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{options.threads} thread(s), {'wall' if options.wall else 'CPU'} time, load {load:.1f}")
    problems: list[str] = []
    if options.only in (None, "bart"):
        problems = beside_bart(options, clock)
    if options.only in (None, "step"):
        whole_step(options, clock)
    if options.only in (None, "memory"):
        peak_table()
    if problems:
        sys.exit("slower than BART: " + "; ".join(problems))


if __name__ == "__main__":
    main()
