"""Drawing image tokens at DALL·E Mini's size: ours, min-dalle, and transformers' BART with guidance by batch.

    python -m benchmarks.generation                      # 64 tokens in the middle of a picture, 1 and 4 pictures
    python -m benchmarks.generation --whole              # all 256 tokens instead

Random weights, float32, CPU, super conditioning of 10, top-k 256. Every system draws from a prompt of 64 token slots,
20 of them filled. The runs are interleaved in one process: system A, B, C, A, B, C. Times are CPU seconds, so other
work on the machine counts little, over as many threads as `--threads` says. Peak memory is that of a process of its
own, which loads a checkpoint as the system's users do and draws 16 tokens. min-dalle is installed by
`pip install 'dalle-torch[bench]'`; transformers' BART holds as many weights and, like ours, is run as its users would:
cached, conditional and unconditional rows in one batch.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("ours", "ours int8", "min-dalle", "transformers")
LENGTH = 256


def run_once(start: Any, first: int, tokens: int) -> float:
    """CPU seconds a token of drawing `tokens` tokens from position `first` on; the encoder is not counted."""
    step = start(first)
    step(first)
    begun = time.process_time()
    for position in range(first + 1, first + tokens):
        step(position)
    return (time.process_time() - begun) / (tokens - 1)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Interleaved runs of every system for each number of pictures."""
    import torch

    from benchmarks.generation_systems import SYSTEMS

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    first, tokens = (0, LENGTH) if arguments.whole else ((LENGTH - arguments.tokens) // 2, arguments.tokens)
    rows = []
    floor = weight_reading_floor(torch)
    for pictures in arguments.pictures:
        with torch.inference_mode():
            systems = {name: SYSTEMS[name]() for name in arguments.systems}
            starts = {name: system.drawing(system.build(), pictures) for name, system in systems.items()}
            times: dict[str, list[float]] = {name: [] for name in starts}
            for _ in range(arguments.rounds):
                for name, start in starts.items():
                    times[name].append(run_once(start, first, tokens))
                    print(f"{pictures} pictures, {name}: {times[name][-1]:.4f} s/token", file=sys.stderr, flush=True)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append({
                "pictures": pictures, "system": name, "seconds_a_token": median, "times_floor": median / floor,
                "seconds_a_picture": median * LENGTH / pictures, "spread": [min(seconds), max(seconds)],
            })  # fmt: skip
    return rows


def weight_reading_floor(torch: Any) -> float:
    """Seconds to read the decoder's and `lm_head`'s float32 weights once, at the rate of a matrix-vector product."""
    from benchmarks.generation_systems import GLU, IMAGE_VOCAB, LAYERS, WIDTH

    weights = [torch.randn(4096, WIDTH) for _ in range(16)]
    vector = torch.randn(WIDTH)
    seconds = []
    for _ in range(7):
        begun = time.process_time()
        for weight in weights:
            weight.mv(vector)
        seconds.append(time.process_time() - begun)
    numbers = LAYERS * (8 * WIDTH**2 + 3 * WIDTH * GLU) + WIDTH * (IMAGE_VOCAB + 1) - LAYERS * 2 * WIDTH**2
    return statistics.median(seconds) * numbers / (len(weights) * weights[0].numel())


def peak_memory(name: str, pictures: Sequence[int], threads: int) -> dict[int, float]:
    """Peak resident GB of a fresh process that loads a checkpoint of `name` and draws 16 tokens, by pictures."""
    with tempfile.TemporaryDirectory() as folder:
        _child("save", name, folder, 1, threads)
        return {n: float(_child("draw", name, folder, n, threads).splitlines()[-1]) for n in pictures}


def _child(task: str, name: str, folder: str, pictures: int, threads: int) -> str:
    command = [sys.executable, "-m", "benchmarks.generation", "--task", task, "--systems", name, "--folder", folder]
    command += ["--pictures", str(pictures), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def run_task(arguments: argparse.Namespace) -> None:
    """What a process of its own does: write a checkpoint, or load it, draw, and print the peak of its memory in GB."""
    import torch

    from benchmarks.generation_systems import SYSTEMS

    torch.set_num_threads(arguments.threads)
    system = SYSTEMS[arguments.systems[0]]()
    checkpoint = Path(arguments.folder) / "checkpoint"
    with torch.inference_mode():
        if arguments.task == "save":
            return system.save(system.build(), checkpoint)
        run_once(system.drawing(system.load(checkpoint), arguments.pictures[0]), LENGTH // 2, 16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, with how many times faster each system is than the two peers."""
    by_key = {(row["pictures"], row["system"]): row["seconds_a_token"] for row in rows}
    print(f"{'pictures':>8} {'system':<13} {'s/token':>8} {'s/picture':>9} {'x floor':>7} {'vs min-dalle':>12} "
          f"{'vs transformers':>15} {'peak GB':>8}")  # fmt: skip
    for row in rows:
        ratios = [
            f"{by_key[row['pictures'], peer] / row['seconds_a_token']:.2f}x"
            if (row["pictures"], peer) in by_key
            else "-"
            for peer in ("min-dalle", "transformers")
        ]
        memory = f"{row['peak_gb']:.2f}" if "peak_gb" in row else "-"
        times = f"{row['seconds_a_token']:>8.4f} {row['seconds_a_picture']:>9.1f} {row['times_floor']:>7.2f}"
        print(f"{row['pictures']:>8} {row['system']:<13} {times} {ratios[0]:>12} {ratios[1]:>15} {memory:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4], help="pictures drawn at once")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tokens", type=int, default=64, help="tokens drawn in the middle of a picture")
    parser.add_argument("--whole", action="store_true", help="draw all tokens of a picture")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system; the median is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each system")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--task", choices=("save", "draw"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["USE_TORCH_XLA"] = "0"
    if arguments.task:
        return run_task(arguments)
    # Memory first: a child inherits the peak of the process that starts it.
    peaks = {
        name: peak_memory(name, arguments.pictures, arguments.threads)
        for name in ([] if arguments.no_memory else arguments.systems)
    }
    rows = compare(arguments)
    for row in rows:
        if row["system"] in peaks:
            row["peak_gb"] = peaks[row["system"]][row["pictures"]]
    report(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
