"""The mesh of a run: dp groups of mp devices each, and how a batch is shared out among them.

Owns: arithmetic, and the refusal of what does not come out even. Does not own: asking a runtime for its devices
(`spmd`), how parameters lie on the mesh (`rules`). Nothing here needs an accelerator or its library.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dalle_torch.config import MeshConfig

AXES = ("dp", "mp")
"""Data parallel, model parallel: the rows and columns of the mesh."""


@dataclass(frozen=True)
class MeshPlan:
    """All devices of a run as a grid of `dp` rows and `mp` columns; a row holds one copy of the model.

    Attributes:
        devices: of all hosts together.
        hosts: processes that drive them.
        devices_per_host: the same for every host.
        mp: devices that a copy of the model is split over, all of one host: they exchange activations in every layer.

    Raises:
        ValueError: the numbers contradict each other; every offender is named.
    """

    devices: int
    hosts: int = 1
    devices_per_host: int = 1
    mp: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("devices", "hosts", "devices_per_host", "mp")
            if getattr(self, name) < 1
        ]
        if not problems:
            problems = [*self._host_problems(), *self._group_problems()]
        if problems:
            raise ValueError("the mesh does not fit the devices: " + "; ".join(problems))

    @property
    def dp(self) -> int:
        """Copies of the model, each with its own samples."""
        return self.devices // self.mp

    @property
    def groups_per_host(self) -> int:
        """Rows of the mesh that a host drives."""
        return self.devices_per_host // self.mp

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, in the order of `AXES`."""
        return {"dp": self.dp, "mp": self.mp}

    def device_order(self, of_hosts: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The devices in the order of the mesh, row by row, so that each mp group lies on one host.

        A pod numbers its devices by their place in it, and so a host's devices need not be neighbours.

        Args:
            of_hosts: for each host the numbers of its devices.

        Raises:
            ValueError: they are not `hosts` hosts with `devices_per_host` devices each, numbered from 0 without gaps.
        """
        counts = [len(devices) for devices in of_hosts]
        if counts != [self.devices_per_host] * self.hosts:
            raise ValueError(
                f"the mesh does not fit the devices: {self.hosts} hosts with {self.devices_per_host} devices each were "
                f"planned, but hosts were found with {', '.join(map(str, counts)) or 'none'}: start every host, and "
                f"the same kind of host"
            )
        order = tuple(device for devices in of_hosts for device in sorted(devices))
        if sorted(order) != list(range(self.devices)):
            raise ValueError(
                f"the mesh does not fit the devices: their numbers must be 0 to {self.devices - 1}, each on one host, "
                f"but hosts have {'; '.join(', '.join(map(str, sorted(devices))) for devices in of_hosts)}"
            )
        host_of = {device: host for host, devices in enumerate(of_hosts) for device in devices}
        rows = [order[row * self.mp : (row + 1) * self.mp] for row in range(self.dp)]
        assert all(len({host_of[device] for device in row}) == 1 for row in rows), "an mp group lies on several hosts"
        return order

    def __str__(self) -> str:
        return (
            f"dp {self.dp} x mp {self.mp} = {self.devices} devices "
            f"({self.hosts} hosts x {self.devices_per_host}, {self.groups_per_host} mp groups a host)"
        )

    def _host_problems(self) -> list[str]:
        if self.hosts * self.devices_per_host == self.devices:
            return []
        return [
            f"{self.hosts} hosts x {self.devices_per_host} devices a host = {self.hosts * self.devices_per_host}, but "
            f"there are {self.devices} devices: every host must have the same number of them"
        ]

    def _group_problems(self) -> list[str]:
        if self.devices_per_host % self.mp == 0:
            return []
        divisors = [str(n) for n in range(1, self.devices_per_host + 1) if self.devices_per_host % n == 0]
        return [
            f"mesh.mp={self.mp} does not divide the {self.devices_per_host} devices of a host (at most "
            f"{self.devices_per_host}), and an mp group must lie on one host: set mesh.mp to one of "
            f"{', '.join(divisors)}"
        ]


def plan_mesh(config: MeshConfig, devices: int, hosts: int, devices_per_host: int) -> MeshPlan:
    """The mesh that `config` asks for, of the devices there are.

    Raises:
        ValueError: they do not fit.
    """
    plan = MeshPlan(devices, hosts, devices_per_host, config.mp)
    if config.dp is not None and config.dp != plan.dp:
        raise ValueError(
            f"the mesh does not fit the devices: mesh.dp={config.dp} x mesh.mp={config.mp} = {config.dp * config.mp}, "
            f"but there are {devices} devices ({hosts} hosts x {devices_per_host}): set mesh.dp to {plan.dp} or to "
            f"null, which takes all there are"
        )
    return plan


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of an update are shared out: DALL·E Mega's were 44 x 32 x 3 = 4224.

    Attributes:
        mesh: what they are shared among.
        batch_size: samples of one forward and backward pass over all devices, `training.batch_size`.
        accumulation_steps: passes of an update, `training.accumulation_steps`.

    Raises:
        ValueError: the groups of the mesh do not get equally many samples, or a number is below 1.
    """

    mesh: MeshPlan
    batch_size: int
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        dp, problems = self.mesh.dp, []
        if self.accumulation_steps < 1:
            problems.append(f"training.accumulation_steps={self.accumulation_steps} must be at least 1")
        if self.batch_size < 1 or self.batch_size % dp:
            below = max(self.batch_size, 0) // dp * dp
            nearest = " or ".join(str(size) for size in (below, below + dp) if size > 0)
            problems.append(
                f"training.batch_size={self.batch_size} is no multiple, from {dp} up, of dp={dp} (dp = "
                f"{self.mesh.devices} devices / mesh.mp={self.mesh.mp}): set training.batch_size to {nearest}, "
                f"or change mesh.mp"
            )
        if problems:
            raise ValueError("the batch does not fit the mesh: " + "; ".join(problems))

    @property
    def per_group(self) -> int:
        """Samples of one pass of one mp group."""
        return self.batch_size // self.mesh.dp

    @property
    def per_host(self) -> int:
        """Samples of one pass that a host reads."""
        return self.per_group * self.mesh.groups_per_host

    @property
    def per_update(self) -> int:
        """Samples that make one update of the weights."""
        return self.batch_size * self.accumulation_steps

    def __str__(self) -> str:
        return (
            f"{self.per_group} samples x {self.mesh.dp} (dp) x {self.accumulation_steps} accumulation steps = "
            f"{self.per_update} samples an update, {self.per_host * self.accumulation_steps} of each host"
        )
