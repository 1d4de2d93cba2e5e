"""Score a model by one protocol: loss, FID, KID, text-image score, retrieval, diversity, its VQGAN.

Owns: the options of the command and what it says at the end. Does not own: the scores (`studies.evaluate`).
"""

import argparse
import os

from dalle_torch.cli._study import add_study_arguments, folder_of, load_study, writable_folder
from dalle_torch.cli.generate import add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_study_arguments(parser, num_images=1)
    add_sampling_arguments(parser, seed=False)
    parser.add_argument("--output", metavar="DIR", help="folder for evaluation.json, report.html and the pictures, "
                        "which are drawn once; default: evaluation-MODEL")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from dalle_torch.cli._startup import import_models

    import_models(image_processors=True)
    from dalle_torch.studies.drawings import Setting
    from dalle_torch.studies.evaluate import PAGE, RESULT, evaluate, score_rows

    pipe, data, extractor, scorer, options = load_study(args)
    scale, temperature = (
        getattr(pipe.model.config, f"drawing_{name}") if (value := getattr(args, name)) is None else value
        for name in ("condition_scale", "temperature")
    )
    setting = Setting(condition_scale=scale, temperature=temperature, top_k=args.top_k, top_p=args.top_p)
    with writable_folder(str(folder_of(args, "evaluation"))) as folder:
        result = evaluate(pipe, data, extractor, scorer, setting, options, folder)
    print(f"{result['pictures']['count']:,} pictures, {setting}, against {result['data']['samples']:,} samples")
    for name, value, meaning in score_rows(result["scores"]):
        print(f"  {name:26}{value:>12.5g}   {meaning}")
    for name, value in (result["vqgan"] or {}).items():
        print(f"  vqgan {name:20}{value:>12.5g}")
    for notice in result["notices"]:
        print(f"note: {notice}")
    print(f"{folder}{os.sep}{PAGE} shows it; {RESULT} has every digit and how it was measured")
    return 0
