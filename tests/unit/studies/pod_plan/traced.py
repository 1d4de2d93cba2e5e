"""A process that traces both kinds of steps of a small DALL·E and prints what it found, as JSON."""

import json
import os
import sys
from collections import Counter

from dalle_torch.parallel.trace import ENVIRONMENT


def main(config_file: str) -> None:
    os.environ.update(ENVIRONMENT)
    from dalle_torch.config import RunConfig
    from dalle_torch.config_io import load_config
    from dalle_torch.studies.pod_plan.memory import inputs_by_kind, kind_of
    from dalle_torch.studies.pod_plan.steps import trace_steps
    from dalle_torch.training.setup import model_config

    config = load_config(RunConfig, config_file)
    found = {}
    for kind, step in trace_steps(config, model_config(config.model), [[0, 1, 4, 5], [2, 3, 6, 7]]):
        found[kind] = {
            "program": len(step.program),
            "devices": step.devices,
            "bytes": inputs_by_kind(step.inputs),
            "inputs": Counter(kind_of(entry.name) for entry in step.inputs),
            "overwritten": Counter(kind_of(entry.name) for entry in step.inputs if entry.output is not None),
            "right_places": all(
                step.outputs[entry.output] == entry.name for entry in step.inputs if entry.output is not None
            ),
            "first_outputs": step.outputs[:2],
            "q_proj": next(e.sharding for e in step.inputs if e.name == "decoder.layers.0.self_attn.q_proj.weight"),
            "batch": sorted([e.dtype, *e.shape] for e in step.inputs if e.name.startswith("batch")),
            "names_modules": b"decoder" in step.program and b"optimizer" in step.program,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
