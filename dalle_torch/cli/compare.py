"""Train variants or optimizers on the same data, seeds and budget, and compare their losses.

Owns: options and what is printed. Does not own: the comparison (`studies.compare`).
"""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Formatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file of the comparison, as configs/compare/variants.yaml"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the comparison; what is in it goes on. Default: "
                        "runs/compare-NAME of the file")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="lay an option over the file, as run.training.steps=100 or 'seeds=[0]'; may come several "
                        "times")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="runs beside each other, one thread each. Default: one a "
                        "core")  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="train this row alone; may come "
                        "several times")  # fmt: skip
    parser.add_argument("--seed", action="append", type=int, default=[], metavar="N",
                        help="train with this seed of the file alone; may come several times")  # fmt: skip
    parser.add_argument("--rerun", action="store_true", help="train runs anew that the folder has with other settings")
    parser.add_argument("--report-only", action="store_true", help="train nothing: table and report of the runs that "
                        "are there")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.jobs is not None:
        jobs = args.jobs
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1")
    from dalle_torch.cli._startup import import_models

    import_models()
    from dalle_torch.studies.compare import Study, save_results
    from dalle_torch.studies.compare_config import load_comparison
    from dalle_torch.studies.compare_report import write_report

    config = load_comparison(args.config, args.overrides)
    output = Path("runs") / f"compare-{Path(args.config).stem}" if args.output is None else Path(args.output)
    study = Study(config, output, rerun=args.rerun)
    failed = {} if args.report_only else study.train(jobs, args.only, args.seed)
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again:")
        for name, reason in failed.items():
            print(f"  {name}: {reason} ({study.runs / name / 'log.txt'})")
    comparison = study.results()
    save_results(comparison, config, study.output)
    write_report(comparison, config, study.output)
    print(comparison.text())
    print(f"chance {comparison.chance:.4f}; {output}/report.html, comparison.csv, comparison.json, losses-*.png")
    if comparison.missing and not failed:
        print(f"{comparison.missing} runs are not finished: the same command without --report-only goes on")
    return 1 if failed else 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


_EPILOG = """\
DIR gets runs/NAME-seedN (a folder as `dalle-torch train` makes it, with result.json), comparison.csv, comparison.json,
losses-steps.png, losses-seconds.png and report.html. Ctrl-C saves all runs; the same command goes on, and what is
finished is not run again. wandb gets all runs as one group with --set run.tracking.wandb=online.

  dalle-torch compare configs/compare/variants.yaml
  dalle-torch compare configs/compare/optimizers.yaml --output runs/optimizers --jobs 2
  dalle-torch compare my.yaml --set 'seeds=[0, 1, 2, 3, 4]' --set run.training.steps=2000
"""
