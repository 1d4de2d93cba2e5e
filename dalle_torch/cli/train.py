"""Train a model on shards of tokens, or fine-tune one: on a CPU, on GPUs, on a TPU pod.

Owns: options and what is printed before and after. Does not own: the run (`training.run`).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_torch.config import RunConfig

TPU_DEVICES_PER_HOST = 8
"""Of TPU v2 and v3; four chips, which are as many devices, of the later ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Formatter
    parser.epilog = _EPILOG
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run, as configs/train/*.yaml")
    parser.add_argument("--output", metavar="RUN", help="folder of the run; what is in it goes on. Default: runs/NAME "
                        "of the file")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="lay an option over the file, as optimizer.lr=3e-4; may come several times")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print mesh, batches, parameters and bytes a device; "
                        "train nothing")  # fmt: skip
    parser.add_argument("--devices-per-host", type=int, default=TPU_DEVICES_PER_HOST, metavar="N",
                        help="of the pod that --dry-run plans for")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from dalle_torch.config import RunConfig
    from dalle_torch.config_io import load_config

    config = load_config(RunConfig, args.config, args.overrides)
    if args.dry_run:
        return _plan(config, args.devices_per_host)
    # torch_xla asks for its devices when it is imported, which some of these do in passing.
    _choose_backend(config)
    from dalle_torch.training.run import train_run
    from dalle_torch.training.signals import EXIT_STATUS

    output = Path("runs") / Path(args.config).stem if args.output is None else Path(args.output)
    outcome = train_run(config, output)
    return EXIT_STATUS[outcome]


def _choose_backend(config: "RunConfig") -> None:
    import os

    os.environ["USE_TORCH_XLA"] = "1" if config.runtime.backend == "xla" else "0"
    # XLA warns at every compilation of what it will do otherwise one day.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from dalle_torch.cli._startup import import_models

    import_models()


def _plan(config: "RunConfig", devices_per_host: int) -> int:
    if devices_per_host < 1:
        raise ValueError(f"--devices-per-host {devices_per_host} must be at least 1")
    from dalle_torch.cli._startup import import_models

    import_models()
    from dalle_torch.training.plan import devices_of, plan_run
    from dalle_torch.training.setup import model_config

    print(plan_run(config, model_config(config.model), *devices_of(config, devices_per_host)))
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


_EPILOG = """\
RUN gets config.yaml (the options it began with), metrics.jsonl, history.jsonl (settings adjusted on the way), samples/
and checkpoints/. The same command goes on from the newest checkpoint. Ctrl-C and SIGTERM save and stop after the update
at hand; Ctrl-C twice stops at once. While it runs: dalle-torch adjust RUN learning_rate=5e-5.

  dalle-torch train --config configs/train/finetune-1gpu.yaml --output runs/mine --set 'data.train=[tokens]'
  torchrun --nproc-per-node 4 -m dalle_torch.cli.main train --config configs/train/finetune-1gpu.yaml
  dalle-torch train --config configs/train/mega-v3-256.yaml --dry-run
"""
