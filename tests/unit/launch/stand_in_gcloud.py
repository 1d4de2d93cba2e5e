"""A stand-in for gcloud: a TPU whose hosts are folders of this machine, and whose ssh runs their commands as processes.

`STAND_IN_GCLOUD` names a folder: `node.json` is the TPU (zone, name, description), `host-N` is the home of host N, and
`calls.jsonl` gets a line for each call. As with gcloud, an ssh that breaks (`drop-N` appears) starts its command anew,
and one that finds no host (`unreachable-N` is there) gives up. As with sshd, what ran on a host learns of the end of a
connection only by its pipes.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

CLOUD = Path(os.environ["STAND_IN_GCLOUD"])


def main() -> int:
    words = sys.argv[1:]
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    words = [word for word in words if word not in ("alpha", "--quiet")]
    assert words[:2] == ["compute", "tpus"], words
    verb, rest = words[3], words[4:]
    options = dict(word.removeprefix("--").split("=", 1) for word in rest if word.startswith("--") and "=" in word)
    if verb == "describe":
        return describe(rest[0], options)
    if verb == "scp":
        name = rest[1].partition(":")[2]
        for home in CLOUD.glob("host-?"):
            shutil.copy(rest[0], home / name)
    if verb == "ssh":
        return ssh(int(options["worker"]), options["command"])
    return 0


def describe(name: str, options: dict[str, str]) -> int:
    try:
        node = json.loads((CLOUD / "node.json").read_text())
    except FileNotFoundError:
        node = {"zone": None}
    if options["zone"] != node["zone"] or name != node["name"]:
        print(
            f"ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource "
            f"'projects/p/locations/{options['zone']}/nodes/{name}' was not found",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(node["description"]))
    return 0


def ssh(worker: int, command: str) -> int:
    print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr, flush=True)
    if (CLOUD / f"unreachable-{worker}").exists():
        print("ssh: connect to host 10.0.0.1 port 22: Connection timed out", file=sys.stderr)
        print("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
        return 1
    while True:
        status = connect(worker, command)
        if status is not None:
            return status
        print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr, flush=True)


def connect(worker: int, command: str) -> int | None:
    """The command's exit status; None if the connection broke."""
    home = CLOUD / f"host-{worker}"
    env = {"HOME": str(home), "XLA_DIST_STATE": str(home / "state"), "PATH": f"{CLOUD / 'host-bin'}:/usr/bin:/bin"}
    remote = subprocess.Popen(
        ["sh", "-c", command], cwd=home, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert remote.stdin is not None and remote.stdout is not None
    broken = threading.Event()

    def copy(source: int, sink: int, close: bool) -> None:
        try:
            while (block := os.read(source, 1 << 16)) and not broken.is_set():
                os.write(sink, block)
        except OSError:
            pass
        if close:
            os.close(sink)

    threading.Thread(target=copy, args=(0, remote.stdin.fileno(), True), daemon=True).start()
    output = threading.Thread(target=copy, args=(remote.stdout.fileno(), 1, False), daemon=True)
    output.start()
    drop = CLOUD / f"drop-{worker}"
    while output.is_alive():
        if drop.exists():
            drop.unlink()
            broken.set()
            # The command goes on over there, and the next one has this connection's standard input.
            time.sleep(0.1)
            return None
        time.sleep(0.02)
    return remote.wait()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
