"""The plan of a run on a slice of a pod: each kind of its steps traced, compiled, and read.

Owns: the order, and the numbers of a plan. Does not own: tables of them (`report`), variants beside each other
(`sweep`).
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dalle_torch.config import RunConfig
from dalle_torch.log import get_logger
from dalle_torch.models.configuration import DalleBartConfig
from dalle_torch.parallel.mesh import AXES, BatchPlan, MeshPlan, plan_mesh
from dalle_torch.parallel.trace import TracedStep
from dalle_torch.studies.pod_plan.chips import Topology
from dalle_torch.studies.pod_plan.collectives import Collective, find_collectives
from dalle_torch.studies.pod_plan.hlo import parse
from dalle_torch.studies.pod_plan.memory import advice, inputs_by_kind, read_message
from dalle_torch.studies.pod_plan.process import Compiled, compile_step, hosts_of
from dalle_torch.studies.pod_plan.roofline import Estimate, estimate, mean
from dalle_torch.studies.pod_plan.steps import WITH_ROOTS, trace_steps
from dalle_torch.studies.pod_plan.work import Work, count_work
from dalle_torch.training.speed import flops_of_sample

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepPlan:
    """One kind of step, of one device.

    Attributes:
        kind: which.
        inputs: bytes by kind.
        memory: bytes as the compiler has them: argument, temp, peak and more; empty if the step does not fit.
        needed, available, largest: of a step that does not fit, in the compiler's words.
        advice: settings that would help it.
        unread: why the program cannot be read, so that only its memory is known; empty: it was.
        unknown_loops: whose turns the compiler does not tell; they count once.
        compile_seconds, compile_bytes: what compiling took.
    """

    kind: str
    inputs: dict[str, int]
    memory: dict[str, int]
    compile_seconds: float
    compile_bytes: int
    work: Work | None = None
    collectives: tuple[Collective, ...] = ()
    estimate: Estimate | None = None
    unknown_loops: int = 0
    needed: str = ""
    available: str = ""
    largest: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    unread: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.memory)


@dataclass(frozen=True)
class PodPlan:
    """A run on a slice.

    Attributes:
        flops: of the model's forward and backward pass of an update, over all devices, without what is computed twice.
        steps: each kind.
        roots_every: how many updates lie between those with roots; 0: there is one kind.
    """

    topology: Topology
    mesh: MeshPlan
    batches: BatchPlan
    flops: float
    steps: tuple[StepPlan, ...]
    roots_every: int = 0

    @property
    def fits(self) -> bool:
        return all(step.fits for step in self.steps)

    @property
    def peak(self) -> int:
        """Bytes of a device at most, over all kinds of steps."""
        return max(step.memory.get("peak", 0) for step in self.steps)

    @property
    def estimate(self) -> Estimate | None:
        """Of the mean step."""
        estimates = [step.estimate for step in self.steps if step.estimate is not None]
        if len(estimates) < len(self.steps):
            return None
        if len(estimates) == 1:
            return estimates[0]
        share = 1 / self.roots_every
        return mean(estimates, [share if step.kind == WITH_ROOTS else 1 - share for step in self.steps])

    def utilisation(self, seconds: float) -> float:
        """Share of the devices' published arithmetic that the model itself takes if an update takes `seconds`."""
        return self.flops / (seconds * self.mesh.devices * self.topology.chip.core_flops)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the numbers."""
        found = asdict(self)
        found["topology"]["of_libtpu"] = self.topology.of_libtpu
        mean_step = self.estimate
        if mean_step is not None:
            found["estimate"] = asdict(mean_step) | {
                "least_seconds": mean_step.least,
                "most_seconds": mean_step.most,
                "limit": mean_step.limit,
                "utilisation_at_most": self.utilisation(mean_step.least),
                "utilisation_one_after_the_other": self.utilisation(mean_step.most),
            }
        for entry, step in zip(found["steps"], self.steps, strict=True):
            entry["fits"] = step.fits
            for part, collective in zip(entry["collectives"], step.collectives, strict=True):
                part["moved"] = collective.moved
        return found


def plan_pod(
    config: RunConfig,
    network: DalleBartConfig,
    topology: Topology,
    python: str | None = None,
    programs: Path | None = None,
    only: str | None = None,
) -> PodPlan:
    """The plan of `config` on `topology`: minutes of one core for each kind of step.

    Args:
        python: an interpreter that has the compiler; None: this one.
        programs: a folder for the compiled programs' text.
        only: one kind of step, `WITH_ROOTS` or `PLAIN`; None: each that there is.

    Raises:
        ValueError: there is no such kind of step, mesh, batch or layout do not come out even, or the compiler is not
            there.
        RuntimeError: the compiler failed for another reason than memory.
    """
    of_hosts = hosts_of(topology, python)
    mesh = plan_mesh(config.mesh, topology.devices, len(of_hosts), len(of_hosts[0]))
    config = replace(config, mesh=replace(config.mesh, dp=mesh.dp))
    steps = []
    for kind, traced in trace_steps(config, network, of_hosts):
        if only not in (None, kind):
            continue
        logger.info("compiling the step %s for %s: %d MB, minutes", kind, topology.name, len(traced.program) // 10**6)
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_step(traced, topology, Path(folder), python)
        if programs is not None and compiled.text:
            (programs / f"step-{kind.replace(' ', '-')}.hlo.txt").write_text(compiled.text, encoding="utf-8")
        steps.append(_read(config, kind, traced, compiled, topology, mesh.device_order(of_hosts)))
    if not steps:
        raise ValueError(f"no step of this run is {only}: it has other kinds alone; leave --only out")
    intervals = [1, *([config.optimizer.shampoo.preconditioning_compute_steps] if config.optimizer.shampoo else [10])]
    return PodPlan(
        topology=topology,
        mesh=mesh,
        batches=BatchPlan(mesh, config.training.batch_size, config.training.accumulation_steps),
        flops=flops_of_sample(network) * config.training.batch_size * config.training.accumulation_steps,
        steps=tuple(steps),
        roots_every=intervals[-1] if len(steps) > 1 else 0,
    )


def _read(
    config: RunConfig, kind: str, traced: TracedStep, compiled: Compiled, topology: Topology, order: tuple[int, ...]
) -> StepPlan:
    inputs = inputs_by_kind(traced.inputs)
    taken = (compiled.seconds, compiled.host_bytes)
    if compiled.out_of_memory is not None:
        needed, available, largest = read_message(compiled.out_of_memory)
        help_ = tuple(advice(config, traced.inputs))
        return StepPlan(
            kind, inputs, {}, *taken, needed=needed, available=available, largest=tuple(largest), advice=help_
        )
    if compiled.unread is not None:
        return StepPlan(kind, inputs, compiled.memory, *taken, unread=compiled.unread)
    program = parse(compiled.text)
    mp = config.mesh.mp
    place_of = {device: divmod(place, mp) for place, device in enumerate(order)}
    collectives = tuple(find_collectives(program, place_of, AXES))
    work = count_work(program)
    return StepPlan(
        kind,
        inputs,
        compiled.memory,
        *taken,
        work=work,
        collectives=collectives,
        estimate=estimate(work, collectives, topology.chip),
        unknown_loops=program.unknown_loops,
    )
