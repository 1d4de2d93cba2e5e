"""Draw 64 captioned shapes with the embedded model and count how many are right.

Owns: the prompts, the report and its pictures. Does not own: drawing (`pipeline`), judging (`shapes.checker`).
Half of the prompts pair a colour with a shape that no training picture paired.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_torch.cli.generate import (
    add_model_arguments,
    add_sampling_arguments,
    check_options,
    load_pipeline,
    sampling_options,
    writable_folder,
)

if TYPE_CHECKING:
    from dalle_torch.pipeline.output import DallePipelineOutput

PROMPT_SEED = 20220726
"""Where the demonstration's prompts begin, far from the scenes that training counts through from 0."""
TRAINING_FOLDER = "runs/shapes"
SINGLES = 3
"""Pictures of each half that are written by themselves, beside the sheet of all."""

_PROPERTIES = ("color", "shape", "size", "place", "relation", "parts", "background")


@dataclass
class Half:
    """The prompts of one kind and how their pictures were judged."""

    name: str
    prompts: list[str]
    failures: list[dict[str, str]] = field(default_factory=list)
    """For each prompt the properties that are wrong, and why."""

    @property
    def right(self) -> int:
        return sum(not failures for failures in self.failures)

    @property
    def accuracy(self) -> float:
        return self.right / len(self.prompts)

    @property
    def of_one_object(self) -> "Half":
        """Those of the prompts that name one object."""
        from dalle_torch.shapes.grammar import parse_caption

        chosen = [index for index, prompt in enumerate(self.prompts) if len(parse_caption(prompt).parts) == 1]
        failures = [self.failures[index] for index in chosen]
        return Half("  of one object", [self.prompts[index] for index in chosen], failures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="an even number of prompts")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(temperature=0.0)
    parser.add_argument("--output", default="out", metavar="DIR", help="folder; the last demo's files are replaced")
    parser.add_argument("--min-seen", type=float, default=0.0, metavar="SHARE", help="fail below this accuracy, as 0.9")
    parser.add_argument("--min-unseen", type=float, default=0.0, metavar="SHARE", help="the same for unseen pairs")
    parser.add_argument("--train", nargs="?", const=TRAINING_FOLDER, metavar="DIR", help="first train a model from "
                        "nothing in DIR: shapes, their VQGAN, shards of codes, a DalleBart by Distributed Shampoo; "
                        f"15 to 20 minutes on 2 cores (DIR: {TRAINING_FOLDER})")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file of that training, as configs/train/shapes.yaml; "
                        "by default a short one")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="lay an option over it, as training.steps=500; may come several times")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.prompts < 2 or args.prompts % 2:
        raise ValueError(f"--prompts {args.prompts} must be an even number of at least 2")
    check_options(args)
    if args.train is not None:
        trained = _train(args)
        if trained is None:
            return 0
        args.model = str(trained)
    elif args.config is not None or args.overrides:
        raise ValueError("--config and --set are options of the training: add --train")
    with writable_folder(args.output) as folder:
        pipe = load_pipeline(args)
        halves = sample_halves(args.prompts // 2, args.seed)
        _check_size(pipe.vqgan.config.resolution, args.model)
        print(f"drawing {args.prompts} pictures, half of them of pairs never seen in training ...", flush=True)
        output = pipe([prompt for half in halves for prompt in half.prompts], **sampling_options(args))
        output.settings["model_hash"] = pipe.model_hash
        judge(output, halves)
        _write(output, halves, folder)
    print(table(halves))
    _say_what_next(folder)
    minima = (("seen", halves[0], args.min_seen), ("unseen", halves[1], args.min_unseen))
    missed = [f"{half.accuracy:.1%} on {name} pairs, below {least:.1%}" for name, half, least in minima
              if half.accuracy < least]  # fmt: skip
    if missed:
        print(f"dalle-torch: error: accuracy is {' and '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _train(args: argparse.Namespace) -> Path | None:
    """The folder of a model made from nothing, or None where the training was stopped before its end."""
    if args.model != "shapes":
        raise ValueError(f"--model {args.model} and --train exclude each other: give one")
    from dalle_torch.config import ShapesConfig
    from dalle_torch.config_io import load_config
    from dalle_torch.storage.embedded import EMBEDDED
    from dalle_torch.training.shapes import run_recipe

    file = args.config or EMBEDDED["shapes"] / "train.yaml"
    return run_recipe(load_config(ShapesConfig, file, args.overrides), args.train)


def sample_halves(count: int, seed: int) -> list[Half]:
    """`count` prompts of pairs that training shows, and as many with a pair that it never does."""
    from dalle_torch.shapes.sampling import sample_prompts

    halves = []
    for name, unseen in (("seen", False), ("unseen", True)):
        # Some scenes come twice; every prompt of the demonstration is another one.
        prompts = dict.fromkeys(sample_prompts(2 * count + 16, PROMPT_SEED + seed, unseen=unseen))
        halves.append(Half(name, list(prompts)[:count]))
    return halves


def judge(output: "DallePipelineOutput", halves: Sequence[Half]) -> None:
    """Compare every picture with its prompt; fills `failures`."""
    from dalle_torch.shapes.checker import check
    from dalle_torch.shapes.grammar import parse_caption

    images = iter(output.images)
    for half in halves:
        half.failures = [check(next(images), parse_caption(prompt)).failures for prompt in half.prompts]


def table(halves: Sequence[Half]) -> str:
    """Accuracy of each half, how often each property was wrong, and every picture that is."""
    lines = [f"{'':18}{'right':>8}{'accuracy':>10}   wrong: " + "  ".join(_PROPERTIES)]
    for row in (part for half in halves for part in (half, half.of_one_object) if part.prompts):
        wrong = Counter(name for failures in row.failures for name in failures)
        counts = "  ".join(f"{wrong[name]:>{len(name)}}" for name in _PROPERTIES)
        score = f"{row.right}/{len(row.prompts)}"
        lines.append(f"{row.name:18}{score:>8}{row.accuracy:>10.1%}          {counts}")
    for half in halves:
        for prompt, failures in zip(half.prompts, half.failures, strict=True):
            if failures:
                lines.append(f"  wrong ({half.name}): {prompt}")
                lines += [f"      {name}: {why}" for name, why in failures.items()]
    return "\n".join(lines)


def _check_size(resolution: int, model: str) -> None:
    from dalle_torch.shapes.grammar import IMAGE_SIZE

    if resolution != IMAGE_SIZE:
        raise ValueError(
            f"--model {model} draws {resolution} x {resolution} pixels; the demonstration judges pictures of "
            f"{IMAGE_SIZE} x {IMAGE_SIZE}, of a model trained on captioned shapes"
        )


def _write(output: "DallePipelineOutput", halves: Sequence[Half], folder: Path) -> None:
    from dalle_torch.pipeline.output import make_grid, slug, write_png
    from dalle_torch.storage import atomic_file

    failures = [failure for half in halves for failure in half.failures]
    sheet = make_grid(
        output.images,
        columns=8,
        gap=6,
        labels=output.prompts,
        frames=["crimson" if failure else "limegreen" for failure in failures],
        scale=2,
    )
    accuracy = {half.name: half.accuracy for half in halves}
    write_png(folder / "demo.png", sheet, {"accuracy": accuracy} | output.settings)
    first = 0
    for half in halves:
        for index in range(first, first + min(SINGLES, len(half.prompts))):
            write_png(folder / f"demo-{slug(output.prompts[index])}.png", output.images[index], output.metadata(index))
        first += len(half.prompts)
    names = [half.name for half in halves for _ in half.prompts]
    pictures: list[dict[str, Any]] = [
        {"prompt": prompt, "pair": name, "seed": seed, "right": not failure, "failures": failure}
        for prompt, name, seed, failure in zip(output.prompts, names, output.seeds, failures, strict=True)
    ]
    with atomic_file(folder / "demo.json") as path:
        report = {"accuracy": accuracy, "settings": output.settings, "pictures": pictures}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _say_what_next(folder: Path) -> None:
    print(f"""
{folder / "demo.png"} shows them all: green is right, red is wrong; demo.json says what was found.

Try next:
  dalle-torch generate "a large purple circle above a small green square on a black background" --num-images 9
  dalle-torch generate "an armchair in the shape of an avocado" --model dalle-mini/dalle-mini   (downloads 2 GB)
  dalle-torch generate --help""")
