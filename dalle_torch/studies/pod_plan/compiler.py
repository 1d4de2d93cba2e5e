"""Compiles a program for TPUs that are not there: a process of its own, run as a file.

Owns: JAX and libtpu, at home in this file alone; what they answer, as JSON and XLA's text. Does not own: programs
(`parallel.trace`), what is read out of the answer (`hlo`). Nothing imports this module, and it imports nothing of the
package, so that another environment's interpreter can run it.

    python compiler.py topology v3:8x16                     the devices of a topology
    python compiler.py compile REQUEST FOLDER               REQUEST: JSON that `process.compile_step` writes
    python compiler.py text PROGRAM FOLDER                  PROGRAM: a serialized HloModuleProto

It goes by functions of JAX that are not public; setup.cfg pins the versions they are of.
"""

import json
import os
import resource
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

# libtpu would look for a TPU's metadata server, and JAX for devices.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Compiling takes no device that another process could want as well.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

MISSING, UNKNOWN_TOPOLOGY, UNREADABLE = 3, 4, 5
"""Exit statuses that are answers."""

PROGRAM, EXECUTABLE = "program.txt", "executable.bin"
"""Files of an answer: XLA's text, or where jaxlib cannot give it what libtpu made."""

_LEFTOVERS = (
    "mhlo.cross_program_prefetches",
    "mhlo.input_output_alias",
    "mhlo.is_dynamic",
    "mhlo.use_auto_spmd_partitioning",
    "mhlo.xla_entry_computation_parameter_layouts",
    "mhlo.xla_entry_computation_parameter_tiles",
    "mhlo.xla_entry_computation_result_layout",
    "mhlo.xla_entry_computation_result_tiles",
)
"""What XLA notes on a module as it is and would not take back."""


def main(argv: list[str]) -> int:
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        from jax.experimental import topologies
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    if argv[0] == "topology":
        answer: Any = _topology(topologies, argv[1])
        print(json.dumps([[device.id, device.process_index, device.device_kind] for device in answer]))
        return 0
    folder = Path(argv[2])
    if argv[0] == "text":
        return _write_text(Path(argv[1]).read_bytes(), folder)
    request = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    answer = _compile(request, _topology(topologies, request["topology"]), folder)
    answer["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    return 0


def _end_with_stdin() -> None:
    """Whoever asked holds the other end: once it is gone nobody waits, and compiling would go on for minutes."""
    # Not sys.stdin's: an interpreter that ends wants its lock.
    os.read(0, 1)
    os._exit(1)


def _topology(topologies: Any, name: str) -> Any:
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    except Exception as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        # JAX raises what its runtime does: a missing libtpu is not a wrong name.
        sys.exit(MISSING if "libtpu" in str(error) else UNKNOWN_TOPOLOGY)


def _compile(request: dict[str, Any], devices: Any, folder: Path) -> dict[str, Any]:
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    program = xla_client.XlaComputation(Path(request["program"]).read_bytes())
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(program)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        _annotate(ir, module, request)
        count = request["devices"]
        by_id = sorted(devices, key=lambda device: device.id)
        options = compiler.get_compile_options(1, count, device_assignment=np.arange(count).reshape(1, count))
        options.executable_build_options.use_shardy_partitioner = False
        start = time.monotonic()
        try:
            built = compiler.backend_compile_and_load(
                by_id[0].client, module, xla_client.DeviceList(tuple(by_id)), options, []
            )
        except Exception as error:
            seconds = time.monotonic() - start
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message and "HbmOom" not in message and "hbm" not in message.lower():
                raise
            return {"seconds": seconds, "out_of_memory": message}
        seconds = time.monotonic() - start
    unread = None
    try:
        text = built.hlo_modules()[0].to_string()
    except Exception as error:
        # Of newer chips' programs this jaxlib has no words for all: `executable` takes out what it can read.
        unread = " ".join(str(error).split())
        if (executable := _serialized(built)) is not None:
            (folder / EXECUTABLE).write_bytes(executable)
    else:
        (folder / PROGRAM).write_text(text, encoding="utf-8")
    memory = built.get_compiled_memory_stats()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in names}
    sizes["peak"] = int(memory.peak_memory_in_bytes)
    cost = built.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "seconds": seconds,
        "unread": unread,
        "memory": sizes,
        "cost": {k: float(cost[k]) for k in ("flops", "bytes accessed") if k in cost},
    }


def _serialized(built: Any) -> bytes | None:
    try:
        return bytes(built.serialize())
    except Exception as error:
        print(error, file=sys.stderr)
        return None


def _write_text(program: bytes, folder: Path) -> int:
    from jax._src.lib import xla_client

    try:
        text = xla_client.hlo.HloModule.from_serialized_hlo_module_proto(program).to_string()
    except Exception as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return UNREADABLE
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    return 0


def _annotate(ir: Any, module: Any, request: dict[str, Any]) -> None:
    """Lay the arguments out, have results take the place of those they replace, as torch_xla does on the devices."""
    (function,) = (op for op in module.body.operations if "main" in str(op.attributes["sym_name"]))
    inputs, outputs = request["inputs"], request["outputs"]
    results: list[dict[str, Any]] = [{} for _ in outputs]
    arguments = []
    for entry in inputs:
        found = {"mhlo.sharding": ir.StringAttr.get(entry["sharding"])}
        if entry["output"] is not None:
            number = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), entry["output"])
            found["tf.aliasing_output"] = number
            results[entry["output"]]["mhlo.sharding"] = found["mhlo.sharding"]
        arguments.append(ir.DictAttr.get(found))
    function.attributes["arg_attrs"] = ir.ArrayAttr.get(arguments)
    function.attributes["res_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(found) for found in results])
    attributes = module.operation.attributes
    attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), request["devices"])
    attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)
    for name in _LEFTOVERS:
        if name in attributes:
            del attributes[name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
