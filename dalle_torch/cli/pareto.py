"""Compare condition scales and temperatures: FID against text-image score, and which settings no other one beats.

Owns: the options of the command and what it says at the end. Does not own: the study (`studies.pareto`).
"""

import argparse
import os
from collections.abc import Callable
from typing import TypeVar

from dalle_torch.cli._study import add_study_arguments, folder_of, load_study, writable_folder

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "An interrupted study goes on, and one with more settings draws only the new ones."
    add_study_arguments(parser, num_images=2)
    parser.add_argument("--condition-scale", type=_listed(float), default="1,2,4,8,16,32", metavar="S,S,...",
                        help="weights of the prompt")  # fmt: skip
    parser.add_argument("--temperature", type=_listed(float), default="1", metavar="T,T,...")
    parser.add_argument("--top-k", type=_listed(_top_k), default="all", metavar="K,K,...",
                        help="only the K most likely tokens; all: no such limit")  # fmt: skip
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that reach P together")
    parser.add_argument("--output", metavar="DIR", help="folder for pareto.html, .png, .csv, .json and the pictures; "
                        "default: pareto-MODEL")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from dalle_torch.cli._startup import import_models

    import_models(image_processors=True)
    from dalle_torch.studies.pareto import pareto, settings_of

    settings = settings_of(args.condition_scale, args.temperature, args.top_k, args.top_p)
    pipe, data, extractor, scorer, options = load_study(args)
    with writable_folder(str(folder_of(args, "pareto"))) as folder:
        result = pareto(pipe, data, extractor, scorer, settings, options, folder)
    print(f"{'scale':>8}{'temp.':>8}{'top-k':>8}{'FID':>11}{'score':>9}{'retrieval':>11}{'diversity':>11}")
    for row in result["settings"]:
        figures = "".join(
            f"{'-' if row[name] is None else format(row[name], '.4g'):>{width}}"
            for name, width in (("fid", 11), ("text_image_score", 9), ("retrieval_accuracy", 11), ("diversity", 11))
        )
        mark = "  *" if row["pareto"] else ""
        print(f"{row['condition_scale']:>8g}{row['temperature']:>8g}{row['top_k'] or 'all':>8}{figures}{mark}")
    print("* on the Pareto front: no other setting has a smaller FID and a higher score")
    for notice in result["notices"]:
        print(f"note: {notice}")
    print(f"{folder}{os.sep}pareto.html shows the pictures; pareto.csv, .json and .png are beside it")
    return 0


def _listed(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    def parse(text: str) -> list[_T]:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None

    return parse


def _top_k(text: str) -> int | None:
    return None if text == "all" else int(text)
