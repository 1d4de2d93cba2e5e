"""The shell scripts against the stand-in for gcloud, and the Kubernetes manifest's arithmetic."""

import math
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.launch.conftest import NAME, REPOSITORY, ZONE, Cloud

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ("create", "setup", "delete")


def script(cloud: Cloud, name: str, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(LAUNCH / f"{name}.sh"), *words], env={**cloud.env, **env}, cwd=cloud.root, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option(cloud: Cloud, name: str) -> None:
    done = script(cloud, name, "--help")
    assert done.returncode == 0
    cases = (LAUNCH / f"{name}.sh").read_text().split("case $1 in")[1].split("esac")[0]
    labels = " ".join(re.findall(r"^ *(-[^)]*)\)", cases, re.MULTILINE))
    understood = set(re.findall(r"--[a-z-]+", labels))
    assert "--dry-run" in understood
    assert understood - {"--help"} <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert not (cloud.root / "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("create", ["--tpu", "a", "--zone", "z"], "--accelerator is missing"),
        ("create", ["--zone", "z", "--accelerator", "v3-8"], "--tpu is missing"),
        ("create", ["--tpu", "a", "--zone", "z", "--accelerator", "v9-8"], "--version is missing"),
        ("create", ["--tpu", "a", "--zone"], "--zone needs a value"),
        ("setup", ["--tpu", "a"], "--zone is missing"),
        ("setup", ["--speed", "9"], "--speed is no option"),
        ("delete", ["--zone", "z"], "--tpu is missing"),
    ],
)
def test_what_is_missing_is_named(cloud: Cloud, name: str, words: list[str], message: str) -> None:
    done = script(cloud, name, *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (cloud.root / "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v3-256", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_create(cloud: Cloud, accelerator: str, version: str) -> None:
    words = ["--tpu", NAME, "--zone", ZONE, "--accelerator", accelerator]
    assert script(cloud, "create", *words, "--dry-run").returncode == 0
    assert not (cloud.root / "calls.jsonl").exists()

    done = script(cloud, "create", *words, "--spot", "--project", "p", "--service-account", "a@b")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        ["compute", "tpus", "tpu-vm", "create", NAME, f"--zone={ZONE}", "--project=p",
         f"--accelerator-type={accelerator}", f"--version={version}", "--spot", "--service-account=a@b"]
    ]  # fmt: skip
    assert done.stderr.startswith("+ gcloud compute tpus tpu-vm create pod")


def test_a_queued_resource(cloud: Cloud) -> None:
    assert script(cloud, "create", "--tpu", NAME, "--zone", ZONE, "--accelerator", "v3-8", "--queued").returncode == 0
    assert script(cloud, "delete", "--tpu", NAME, "--zone", ZONE, "--queued", "--yes").returncode == 0
    created, deleted = cloud.calls
    assert created[:5] == ["compute", "tpus", "queued-resources", "create", NAME]
    assert {f"--node-id={NAME}", "--accelerator-type=v3-8", "--runtime-version=tpu-ubuntu2204-base"} <= set(created)
    assert deleted == ["compute", "tpus", "queued-resources", "delete", NAME, f"--zone={ZONE}", "--force", "--quiet"]


def test_delete_asks_unless_it_is_told_not_to(cloud: Cloud) -> None:
    """gcloud asks, where it is not told to be quiet."""
    script(cloud, "delete", "--tpu", NAME, "--zone", ZONE)
    script(cloud, "delete", "--tpu", NAME, "--zone", ZONE, "--yes")
    assert cloud.calls == [
        ["compute", "tpus", "tpu-vm", "delete", NAME, f"--zone={ZONE}"],
        ["compute", "tpus", "tpu-vm", "delete", NAME, f"--zone={ZONE}", "--quiet"],
    ]


@pytest.fixture
def uv(cloud: Cloud) -> None:
    """One that writes down what it is asked, and makes an environment with this package's command."""
    program = cloud.root / "host-bin" / "uv"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> "$HOME/uv"\n'
        "mkdir -p .venv/bin\n"
        "printf '#!/bin/sh\\n' > .venv/bin/python\n"
        "printf '#!/bin/sh\\necho dalle-torch 1 from %s\\n' \"$(cat .commit)\" > .venv/bin/dalle-torch\n"
        "chmod +x .venv/bin/*\n"
    )
    program.chmod(0o755)


@pytest.mark.usefixtures("uv")
@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="only a clone can be copied to hosts")
def test_setup_copies_the_working_tree_and_installs_it(cloud: Cloud) -> None:
    folder = cloud.home(0) / "dalle-torch"
    (folder / "launch").mkdir()
    (folder / "launch" / "stale.py").touch()
    (folder / "runs").mkdir()
    done = script(cloud, "setup", "--tpu", NAME, "--zone", ZONE, "--packages", "gcsfs s3fs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dalle-torch 1 from " in done.stdout
    for host in range(2):
        folder = cloud.home(host) / "dalle-torch"
        assert (folder / "dalle_torch" / "config_io.py").exists() and (folder / "launch" / "xla_dist.py").exists()
        assert (folder / "configs" / "train").is_dir() and (folder / "setup.cfg").exists()
        assert not (folder / "tests").exists()
        first, second = (cloud.home(host) / "uv").read_text().splitlines()
        assert first == "venv --quiet --python 3.12 .venv"
        assert "--editable .[xla,train] torch_xla[tpu]" in second and second.endswith("gcsfs s3fs")
    folder = cloud.home(0) / "dalle-torch"
    assert (folder / "runs").is_dir() and not (folder / "launch" / "stale.py").exists()
    with tarfile.open(cloud.home(0) / "dalle-torch.tgz") as bundle:
        assert ".commit" in bundle.getnames()

    # A second time the environment is there already.
    assert script(cloud, "setup", "--tpu", NAME, "--zone", ZONE).returncode == 0
    assert (cloud.home(0) / "uv").read_text().count("venv --quiet") == 1


@pytest.mark.usefixtures("uv")
def test_setup_from_git(cloud: Cloud, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "README.md").write_text("hello")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *words], cwd=origin, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    done = script(cloud, "setup", "--tpu", NAME, "--zone", ZONE, "--git", f"file://{origin}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cloud.home(1) / "dalle-torch" / "README.md").read_text() == "hello"
    assert not any("scp" in call for call in cloud.calls)


@pytest.mark.usefixtures("uv")
def test_a_host_where_setup_fails_is_shown(cloud: Cloud) -> None:
    (cloud.root / "host-bin" / "uv").write_text("#!/bin/sh\ncase $HOME in *host-1) echo no route; exit 3;; esac\n")
    done = script(cloud, "setup", "--tpu", NAME, "--zone", ZONE, "--git", "file:///nowhere")
    assert done.returncode not in (0, 2)
    assert "its last lines" in done.stderr and "next:" not in done.stderr


def manifest() -> dict[str, Any]:
    (found,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    return dict(found)


def test_the_manifests_hosts_are_those_of_the_slice() -> None:
    jobset = manifest()
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    hosts = chips // limits["google.com/tpu"]
    assert (chips, hosts, limits) == (128, 32, requests)
    assert spec["completions"] == spec["parallelism"] == int(str(env["WORLD_SIZE"])) == hosts
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0 and job["replicas"] == 1

    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert env["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{subdomain}"
    assert int(str(env["MASTER_PORT"])) in [port["containerPort"] for port in container["ports"]]
    rank = next(entry for entry in container["env"] if entry["name"] == "RANK")
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_manifests_other_slices_add_up() -> None:
    rows = re.findall(r"^#   (v\w+-\d+)\s+(\S+)\s+(\d+(?:x\d+)+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+) x (\d+)",
                      (LAUNCH / "gke.yaml").read_text(), re.MULTILINE)  # fmt: skip
    assert len(rows) == 4
    for name, accelerator, topology, *numbers in rows:
        chips, per_host, hosts, dp, mp = map(int, numbers)
        assert math.prod(map(int, topology.split("x"))) == chips == per_host * hosts
        # A core is a device up to v3; from v4 on it is a chip, though v4 is still named by its cores.
        devices = chips * (2 if name.startswith("v3") else 1)
        assert dp * mp == devices
        assert int(name.split("-")[1]) == chips * (2 if name[:2] in ("v3", "v4") else 1)
        assert devices // hosts % mp == 0, "an mp group must lie on one host"
        assert accelerator.startswith("tpu-")


def test_the_manifests_shell_is_one_that_the_signal_gets_past() -> None:
    command = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "command"
    ]
    subprocess.run(["bash", "-n", "-c", command[-1]], check=True)
    assert command[-1].strip().splitlines()[-1].startswith("exec dalle-torch train ")


def test_the_guides_commands_have_options_that_exist() -> None:
    """Every `launch/...` command line of the guide, each option of it."""
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "README.md").read_text())
    understood = {name: set(re.findall(r"--[a-z-]+", (LAUNCH / f"{name}.sh").read_text())) for name in SCRIPTS}
    from launch.xla_dist import build_parser

    understood["xla_dist"] = set(build_parser()._option_string_actions)
    found = 0
    for name, options in re.findall(r"launch/(create|setup|delete|xla_dist)\.(?:sh|py)([^\n`|]*)", text):
        used = re.findall(r"(?<!\S)--[a-z-]+", options.split(" -- ")[0])
        found += len(used)
        assert set(used) <= understood[name], (name, used)
    assert found > 20
