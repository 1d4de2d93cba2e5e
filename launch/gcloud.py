"""The gcloud command line: what a TPU is made of, in which state it is, and how its hosts are reached.

Owns: gcloud's arguments, its answers, and one clear line for whatever it says no with.
Does not own: what runs on hosts.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass, field

READY = "READY"
GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING")
"""States that no waiting ends: the TPU has to be made anew or started."""
KEEP_ALIVE = ("-o ServerAliveInterval=30", "-o ServerAliveCountMax=10", "-o ConnectTimeout=30")
"""ssh gives a silent connection up after 5 minutes."""


class GcloudError(OSError):
    """gcloud is not there, or failed; one line."""


@dataclass(frozen=True)
class Node:
    """A TPU as gcloud describes it."""

    state: str
    addresses: tuple[str, ...] = ()
    """Internal IP address of each host, in the order of gcloud's worker numbers."""
    accelerator: str = "?"
    health: str = ""

    @property
    def ready(self) -> bool:
        return self.state == READY


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """Which TPU, and the way to it."""

    name: str
    """As gcloud takes it; with `USER@` before it, hosts are entered as that user."""
    zone: str
    project: str | None = None
    internal_ip: bool = False
    iap: bool = False
    ssh_flags: tuple[str, ...] = field(default=())

    @property
    def node(self) -> str:
        return self.name.rpartition("@")[2]

    def describe(self) -> Node:
        """What the TPU is now.

        Raises:
            GcloudError: there is no such TPU, or gcloud cannot tell.
        """
        words = ["compute", "tpus", "tpu-vm", "describe", self.node, *self._place(), "--format=json", "--quiet"]
        done = _call(words)
        if done.returncode:
            raise GcloudError(self._explain(_last_error(done.stderr)))
        return read_node(done.stdout)

    def ssh(self, worker: int, command: str) -> list[str]:
        """The words that run `command`, a line for a shell, on one host."""
        track = ["alpha"] if self.iap else []
        way = ["--tunnel-through-iap"] if self.iap else ["--internal-ip"] if self.internal_ip else []
        flags = [f"--ssh-flag={flag}" for flag in (*KEEP_ALIVE, *self.ssh_flags)]
        return [
            "gcloud", *track, "compute", "tpus", "tpu-vm", "ssh", self.name, *self._place(), f"--worker={worker}",
            "--quiet", *way, *flags, f"--command={command}",
        ]  # fmt: skip

    def _place(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def _explain(self, reason: str) -> str:
        line = f"gcloud knows no TPU {self.node} in zone {self.zone}: {reason}"
        if any(sign in reason for sign in ("NOT_FOUND", "not found", "Permission denied on 'locations")):
            return f"{line} (gcloud compute tpus tpu-vm list --zone={self.zone} lists those there are)"
        return f"gcloud cannot describe TPU {self.node} in zone {self.zone}: {reason}"


def read_node(text: str) -> Node:
    """`gcloud compute tpus tpu-vm describe --format=json`, read.

    Raises:
        GcloudError: it is something else.
    """
    try:
        found = json.loads(text)
        endpoints = found.get("networkEndpoints") or []
        # With several networks a host has an endpoint in each, one after the other; gcloud counts by the first.
        networks = max(1, len(found.get("networkConfigs") or []))
        addresses = tuple(str(endpoint["ipAddress"]) for endpoint in endpoints[::networks])
        return Node(
            state=str(found.get("state", "STATE_UNSPECIFIED")),
            addresses=addresses,
            accelerator=str(found.get("acceleratorType", "?")),
            health=str(found.get("healthDescription") or found.get("health") or ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GcloudError(f"gcloud described the TPU in words that are not understood: {text[:200]!r}") from error


def require_gcloud() -> None:
    """Raises GcloudError where there is no gcloud."""
    if shutil.which("gcloud") is None:
        raise GcloudError(
            "gcloud is not on the PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and "
            "run `gcloud auth login`"
        )


def _call(words: list[str]) -> subprocess.CompletedProcess[str]:
    require_gcloud()
    try:
        # In a session of its own, so that Ctrl-C is the launcher's alone to deal with.
        return subprocess.run(
            ["gcloud", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise GcloudError(f"gcloud did not answer in 120 s: gcloud {' '.join(words)}") from error


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1][:500]
