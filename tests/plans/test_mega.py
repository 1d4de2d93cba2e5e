"""Mega's training step with two layers each, compiled for the pod, beside its committed plan.

What a step takes of memory and what its devices tell each other change with the layout, the model and the optimizer. A
change that is meant is committed: copy the plan.json that the failure names over `mega-2-layers.plan.json`. The step is
the one without Shampoo's roots, nine of ten: the other one takes 11 GB of memory and 200 seconds to compile.
"""

import os
import subprocess
import sys
from pathlib import Path

PLANS = Path(__file__).parent
ROOT = PLANS.parents[1]


def test_the_step_takes_and_sends_what_its_committed_plan_says(tmp_path: Path) -> None:
    output = tmp_path / "plan"
    options = ["--set", f"model.config={PLANS / 'mega-2-layers.json'}", "--output", str(output)]
    options += ["--only", "without-roots"]
    options += ["--compare", str(PLANS / "mega-2-layers.plan.json")]
    command = [sys.executable, "-m", "dalle_torch.cli.main", "plan", "--config", "configs/train/mega-v3-256.yaml"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    environment.pop("USE_TORCH_XLA", None)
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}\nthe plan is in {output}"
