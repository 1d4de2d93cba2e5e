"""Time and memory of loading a DALL·E Mini checkpoint in the original's format.

    python -m benchmarks.loading                # 1.75 GB of float32 in one msgpack file, made and removed again
    python -m benchmarks.loading --layers 2     # the same, smaller

Each way of loading runs in a process of its own. Peak memory is that of the whole process above what it held when the
imports were done; the file itself is in the page cache, as it is after a download.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WAYS = {
    "msgpack float32": {"folder": "unstacked"},
    "msgpack float32, layers stacked": {"folder": "stacked"},
    "msgpack float32 -> bfloat16": {"folder": "unstacked", "dtype": "bfloat16"},
    "safetensors float32": {"folder": "safetensors"},
}


def mini_config(layers: int, stacked: bool) -> "DalleBartConfig":  # noqa: F821 (imported late: see main)
    """DALL·E Mini with `layers` layers on each side."""
    from dalle_torch.models.configuration import DalleBartConfig

    return DalleBartConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=1024, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=2730, decoder_ffn_dim=2730, encoder_vocab_size=50264,
        image_vocab_size=16384, use_glu=True, ln_positions="normformer", use_scan=stacked,
    )  # fmt: skip


def write_msgpack(folder: Path, layers: int, stacked: bool) -> None:
    """Write random weights as the original's `save_pretrained` would, one tensor in memory at a time."""
    import msgpack
    import torch

    from dalle_torch.models.convert.flax_dallebart import flax_entries
    from dalle_torch.models.dalle_bart import DalleBart

    config = mini_config(layers, stacked)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DalleBart(config).state_dict().items()}
    tree: dict = {}
    for name, entry in flax_entries(config).items():
        shape = shapes[name][::-1] if entry.form == "kernel" else shapes[name]
        *parents, leaf = entry.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = (layers, *shape) if stacked and entry.layer is not None else shape
    packer = msgpack.Packer()

    def pieces(node: dict | tuple[int, ...]) -> Iterator[bytes]:
        if isinstance(node, dict):
            yield packer.pack_map_header(len(node))
            for name, child in sorted(node.items()):
                yield packer.pack(name)
                yield from pieces(child)
        else:
            values = torch.empty(node).normal_(std=0.02).numpy().tobytes()
            yield packer.pack(msgpack.ExtType(1, msgpack.packb((node, "float32", values))))

    with (folder / "flax_model.msgpack").open("wb") as file:
        file.writelines(pieces(tree))


def write_safetensors(folder: Path, source: Path) -> None:
    from dalle_torch.models.dalle_bart import DalleBart

    DalleBart.from_pretrained(source).save_pretrained(folder)


def measure(folder: Path, dtype: str | None) -> dict[str, float]:
    """Load the model of `folder` in this process and say what that took."""
    import torch

    from dalle_torch.models.dalle_bart import DalleBart

    torch.set_num_threads(1)
    before, cpu, wall = memory("VmRSS"), time.process_time(), time.perf_counter()
    model = DalleBart.from_pretrained(folder, dtype=dtype)
    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    # Touch every weight: a tensor that is only mapped takes its memory now.
    if not all(parameter.detach().sum().isfinite() for parameter in model.parameters()):
        raise ValueError(f"the weights in {folder} did not arrive whole")
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {**taken, "peak": memory("VmHWM") - before, "held": held}


def memory(field: str) -> float:
    """Bytes from /proc/self/status; VmHWM, unlike ru_maxrss, does not count the parent's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def child(*arguments: str) -> str:
    environment = {**os.environ, "USE_TORCH_XLA": "0", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "benchmarks.loading", *arguments]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers on each side")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way; the median is printed")
    parser.add_argument("--folder", help="where the files are made (default: the system's temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=("unstacked", "stacked", "safetensors"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure), options.dtype)))
        return
    if options.write:
        folder = Path(options.folder)
        if options.write == "safetensors":
            write_safetensors(folder, folder.parent / "unstacked")
        else:
            write_msgpack(folder, options.layers, options.write == "stacked")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for name in ("unstacked", "stacked", "safetensors"):
            (Path(temporary) / name).mkdir()
            child("--write", name, "--folder", f"{temporary}/{name}", "--layers", str(options.layers))
        print(f"{'':34}{'file GB':>9}{'CPU s':>8}{'wall s':>8}{'peak GB':>9}{'peak/file':>11}")
        for title, way in WAYS.items():
            folder = Path(temporary) / way["folder"]
            size = sum(path.stat().st_size for path in folder.iterdir())
            extra = ["--dtype", way["dtype"]] if "dtype" in way else []
            runs = [json.loads(child("--measure", str(folder), *extra)) for _ in range(options.repeat)]
            middle = {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}
            print(
                f"{title:34}{size / 1e9:9.2f}{middle['cpu']:8.2f}{middle['wall']:8.2f}{middle['peak'] / 1e9:9.2f}"
                f"{middle['peak'] / size:11.2f}"
            )


if __name__ == "__main__":
    main()
