"""What libtpu makes of a step, read where jaxlib cannot read it back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.parallel.trace import REPLICATED, TracedInput, TracedStep
from dalle_torch.studies.pod_plan import process
from dalle_torch.studies.pod_plan.chips import find_topology
from dalle_torch.studies.pod_plan.executable import message, program_of
from dalle_torch.studies.pod_plan.hlo import parse
from dalle_torch.studies.pod_plan.work import count_work

STEP = """\
import sys
import jax, jax.numpy as jnp

def step(table, places, weights):
    state = weights
    for _ in range(4):
        state = jnp.tanh(state @ weights)
    return table[places] @ weights + state[:1]

shapes = [((4104, 2048), jnp.float32), ((4096,), jnp.uint32), ((2048, 2048), jnp.float32)]
lowered = jax.jit(step).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
sys.stdout.buffer.write(lowered.compiler_ir("hlo").as_serialized_hlo_module_proto())
"""
"""Rows of a table beside products: where there is a SparseCore it fetches them while the others compute."""


@pytest.fixture(scope="module")
def step() -> TracedStep:
    # JAX takes devices and threads where it is imported: it stays out of this process.
    program = subprocess.run(
        [sys.executable, "-c", STEP], env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, check=True
    ).stdout
    inputs = [("table", (4104, 2048), "float32"), ("places", (4096,), "uint32"), ("weights", (2048, 2048), "float32")]
    return TracedStep(program, tuple(TracedInput(*each, REPLICATED, None) for each in inputs), ("sum",), 4)


@pytest.mark.parametrize(("topology", "offloaded"), [("v6e-4", True), ("v5e-4", False)])
def test_a_program_is_read_with_sparse_cores_and_without(
    step: TracedStep, topology: str, offloaded: bool, tmp_path: Path
) -> None:
    compiled = process.compile_step(step, find_topology(topology), tmp_path)
    assert compiled.unread is None
    # The way round jaxlib is taken for the one alone: if it is not needed any more, it can go.
    assert (tmp_path / "executable.bin").is_file() is offloaded
    assert ('async_execution_thread="sparsecore"' in compiled.text) is offloaded
    work = count_work(parse(compiled.text))
    assert work.flops == 4 * 2 * 2048**3 + 2 * 4096 * 2048**2
    rows = 4 * 4096 * 2048
    assert work.bytes >= 4 * 2048**2 + 2 * rows  # weights, rows, the result at least


def executable(records: Sequence[bytes], compression: bytes = b"\0") -> bytes:
    """As libtpu writes it: something of its own, then a file of Riegeli records, each in a chunk."""

    def number(value: int) -> bytes:
        return bytes([value & 127 | (128 if value > 127 else 0)]) + (number(value >> 7) if value > 127 else b"")

    data = bytearray()
    for kind, record in [(b"s", b""), (b"m", b"what it is"), *((b"r", record) for record in records)]:
        sizes = number(len(record))
        chunk = compression + number(len(sizes)) + sizes + record if kind == b"r" else record
        header = bytes(8) + len(chunk).to_bytes(8, "little") + bytes(8) + kind + bytes(7 + 8)
        data += header + chunk
    header = bytes.fromhex("83af70d10d884a3f") + bytes(16)
    room = (1 << 16) - len(header)
    blocks = [data[place : place + room] for place in range(0, len(data), room)]
    return b"of jaxlib's" + b"".join((header if not index else bytes(24)) + block for index, block in enumerate(blocks))


def program(operands: Sequence[int]) -> Message:
    module = message("Module")()
    instructions = module.computations.add().instructions
    instructions.add(opcode=b"async-update", operand_ids=operands)
    instructions.add(opcode=b"add", operand_ids=operands)
    return module


def kept(module: Message) -> bytes:
    return message("Record")(kept=message("Kept")(module=module)).SerializeToString()


@given(
    before=st.lists(st.integers(0, 200_000), max_size=4),
    after=st.lists(st.integers(0, 200_000), max_size=2),
    operands=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
)
def test_the_program_is_found_among_records_of_any_size(
    before: list[int], after: list[int], operands: list[int]
) -> None:
    # A record of zeros is no message: field 0 does not exist.
    records = [*(bytes(size) for size in before), kept(program(operands)), *(bytes(size) for size in after)]
    found = message("Module").FromString(program_of(executable(records)))
    update, add = found.computations[0].instructions
    assert list(update.operand_ids) == operands[:1]
    assert list(add.operand_ids) == operands


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"nothing", "no file of Riegeli records"),
        (executable([kept(program([1]))])[:-1], "cut short"),
        (executable([kept(program([1]))], compression=b"z"), "compressed"),
        (executable([b"\0"]), "0 programs in the executable"),
        (executable([kept(program([1]))] * 2), "2 programs in the executable"),
    ],
)
def test_what_holds_no_program_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        program_of(data)


def test_a_program_that_cannot_be_taken_out_leaves_its_memory_and_both_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*_: object) -> str:
        answer = {"seconds": 1.0, "host_bytes": 2, "unread": "no words for async-update", "memory": {"peak": 3}}
        (tmp_path / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        (tmp_path / "executable.bin").write_bytes(b"nothing")
        return ""

    monkeypatch.setattr(process, "_run", run)
    compiled = process.compile_step(TracedStep(b"", (), (), 1), find_topology("v6e-4"), tmp_path)
    assert compiled.memory == {"peak": 3}
    assert not compiled.text
    assert compiled.unread == "no words for async-update; the executable holds no file of Riegeli records"


ASK = """\
import sys
from dalle_torch.studies.pod_plan import process
from dalle_torch.studies.pod_plan.chips import find_topology
process._run(sys.argv[1:], find_topology("v6e-4"))
"""


def test_a_compiler_ends_with_the_process_that_asked_it(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    os.mkfifo(request)
    compiler = [*process._command(None), "compile", str(request), str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", ASK, *compiler]) as asking:
        # It reads the request, which has no end as long as somebody could write it.
        while (writer := _writer(request)) is None:
            assert asking.poll() is None, "it ended before the compiler began"
            time.sleep(0.1)
        (child,) = psutil.Process(asking.pid).children()
        asking.kill()
    try:
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "it is still there"
    except psutil.NoSuchProcess:
        pass
    finally:
        os.close(writer)


def _writer(fifo: Path) -> int | None:
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads it yet
        return None
