"""Compile a training step for TPUs that are not there: does it fit, what does it move, how long can it take.

Owns: options, and what is printed and written. Does not own: the plan (`studies.pod_plan`).
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_torch.config import RunConfig
    from dalle_torch.studies.pod_plan.plan import PodPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run, as for train")
    parser.add_argument("--topology", metavar="NAME", help="slice of a pod: v2, v3, v4, v5e, v5p or v6e with its "
                        "size, as v3-256, or its shape in chips, as v3:8x16. Default: v3, as the mesh")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="lay an option over the file; may come several times")  # fmt: skip
    parser.add_argument(
        "--output", metavar="FOLDER", help="for plan.json and plan.html. Default: plans/NAME of the file"
    )
    parser.add_argument("--sweep", nargs="+", default=[], metavar="AXIS=VALUES", help="plan every combination, as "
                        "mesh=32x8,16x16 accumulation=1,3,6, and compare them")  # fmt: skip
    parser.add_argument("--only", choices=["with-roots", "without-roots"], help="compile one kind of step; by default "
                        "each, which with Shampoo are two")  # fmt: skip
    parser.add_argument("--compiler-python", metavar="PATH", help="interpreter of an environment that has the "
                        "compiler, jax and libtpu of the extra `plan`, where this one lacks it")  # fmt: skip
    parser.add_argument("--compare", metavar="PLAN.json", help="an earlier plan of the same: say what became different "
                        "in its peak memory and its collectives, with exit status 1 if anything did")  # fmt: skip
    parser.add_argument("--programs", action="store_true", help="keep the compiled programs' text too, megabytes")


def run(args: argparse.Namespace) -> int:
    from dalle_torch.config import RunConfig
    from dalle_torch.config_io import load_config

    config = load_config(RunConfig, args.config, args.overrides)
    if config.runtime.backend != "xla":
        raise ValueError(f"runtime.backend={config.runtime.backend}: a plan is for TPUs; set runtime.backend=xla")
    from dalle_torch.parallel.trace import ENVIRONMENT
    from dalle_torch.studies.pod_plan.chips import find_topology

    if args.topology is not None:
        find_topology(args.topology)
    # Before anything imports torch_xla.
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    output = Path("plans") / Path(args.config).stem if args.output is None else Path(args.output)
    from dalle_torch.cli._startup import import_models

    import_models()
    from dalle_torch.studies.pod_plan.guard import differences, read_plan
    from dalle_torch.studies.pod_plan.report import as_text, write_plan

    if args.sweep and args.compare:
        raise ValueError("--compare is for one plan, and --sweep makes several: leave one of them out")
    before = None if args.compare is None else read_plan(Path(args.compare))
    if args.sweep:
        return _sweep(args, config, output)
    plan = _plan(args, config, output)
    write_plan(plan, output)
    print(as_text(plan))
    print(f"\nwritten: {output / 'plan.json'}, {output / 'plan.html'}")
    if before is None:
        return 0
    found = differences(before, read_plan(output / "plan.json"))
    print("\n".join([f"\ndifferent from {args.compare}:", *found]) if found else f"\nas in {args.compare}")
    return 1 if found else 0


def _plan(args: argparse.Namespace, config: "RunConfig", output: Path) -> "PodPlan":
    from dalle_torch.studies.pod_plan.chips import find_topology
    from dalle_torch.studies.pod_plan.plan import plan_pod
    from dalle_torch.training.setup import model_config

    topology = find_topology(_topology_name(args.topology, config))
    programs = output if args.programs else None
    if programs is not None:
        programs.mkdir(parents=True, exist_ok=True)
    only = None if args.only is None else args.only.replace("-", " ")
    return plan_pod(config, model_config(config.model), topology, args.compiler_python, programs, only)


def _sweep(args: argparse.Namespace, config: "RunConfig", output: Path) -> int:
    from dalle_torch.config import RunConfig
    from dalle_torch.config_io import load_config
    from dalle_torch.studies.pod_plan.report import compare_text, write_plan
    from dalle_torch.studies.pod_plan.sweep import variants

    found: list[tuple[str, PodPlan | str]] = []
    for name, options in list(variants(config, args.sweep)):
        folder = output / name.replace(", ", "_").replace("/", "-")
        try:
            plan = _plan(args, load_config(RunConfig, args.config, [*args.overrides, *options]), folder)
        except ValueError as error:
            if "dalle-torch[plan]" in str(error):
                raise
            # A mesh that does not fit is a result among the others.
            found.append((name, str(error)))
            continue
        write_plan(plan, folder)
        found.append((name, plan))
    print(compare_text(found))
    print(f"\nwritten: {output}, a folder with plan.json and plan.html for each")
    return 0


def _topology_name(given: str | None, config: "RunConfig") -> str:
    if given is not None:
        return given
    if config.mesh.dp is None:
        raise ValueError("mesh.dp=null takes all devices there are: set it, or name the slice, as --topology v3-256")
    return f"v3-{config.mesh.dp * config.mesh.mp}"


_EPILOG = """\
The step is the one that train runs, recorded with stand-ins for weights and data, and compiled as on the pod; nothing
is computed, and no TPU is needed. A DALL·E Mega takes minutes of one core for each of its two kinds of steps and up to
16 GB of memory. Estimates of time go by the chip's published rates, which no program reaches.

  dalle-torch plan --config configs/train/mega-v3-256.yaml
  dalle-torch plan --config configs/train/mega-v3-256.yaml --sweep mesh=32x8,64x4 accumulation=1,3,6
"""
