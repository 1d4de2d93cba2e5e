"""What hosts find out about themselves, and the table that compares them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import preflight
from launch.report import Reports, spans
from tests.unit.launch.conftest import REPOSITORY, Cloud

CONFIG = "mesh: {mp: 8}\ndata:\n  train: ['shards/{0..1}.tar']\n  evaluation: {held: [shards/0.tar]}\n"


def check(config: Path, output: Path | None = None) -> preflight.Report:
    report = preflight.Report()
    preflight.check_without_devices(report, str(config), None if output is None else str(output))
    return report


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "MIN_FREE_GB", 0.0)
    (tmp_path / "shards").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "shards" / name).write_bytes(b"x")
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def test_a_host_that_has_everything(run_file: Path) -> None:
    report = check(run_file, run_file.parent / "new" / "run")
    assert report.problems == []
    assert report.facts["data"] == "train 2, held 1 shards"
    assert report.facts["output"] == "writable"
    assert list((run_file.parent / "new" / "run").iterdir()) == []
    assert {"python", "torch", "torch_xla", "libtpu", "dalle_torch", "commit", "config", "free_gb"} <= set(report.facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "shards" / "1.tar").unlink(), "of which 1 are not: shards/1.tar"),
        (lambda folder: (folder / "run.yaml").write_text("data: {trian: []}"), "section data: "),
        (lambda folder: (folder / "run.yaml").write_text("data: {lanes: 0}"), "lanes=0 must be at least 1"),
        (lambda folder: (folder / "run.yaml").write_text("a: ["), "is no YAML"),
        (lambda folder: (folder / "run.yaml").write_text("[]"), "has no sections"),
        (lambda folder: (folder / "run.yaml").unlink(), "run.yaml is not there"),
    ],
)
def test_what_is_wrong_is_one_line(run_file: Path, change: Any, message: str) -> None:
    change(run_file.parent)
    (problem,) = check(run_file).problems
    assert message in problem and "\n" not in problem


def test_a_folder_that_may_not_be_written(run_file: Path) -> None:
    # Not even by root.
    (problem,) = check(run_file, Path("/proc/run")).problems
    assert problem.startswith("output: ") and "/proc/run" in problem


def test_a_folder_that_is_a_file(run_file: Path) -> None:
    (problem,) = check(run_file, run_file).problems
    assert problem.startswith("output: ") and "run.yaml" in problem


def test_the_checkpoints_folder_of_the_file_is_checked_too(run_file: Path) -> None:
    run_file.write_text(CONFIG + "checkpoint: {folder: nosuchscheme://bucket/run}\n")
    (problem,) = check(run_file).problems
    assert problem.startswith("checkpoints: ") and "nosuchscheme" in problem


def test_too_little_room(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_FREE_GB", 1e9)
    (problem,) = check(run_file).problems
    assert "GB are free" in problem and "are needed" in problem


def test_a_configs_digest_is_of_what_it_says(run_file: Path) -> None:
    first = check(run_file).facts["config"]
    run_file.write_text("# another layout\ndata: {evaluation: {held: ['shards/0.tar']}, train: ['shards/{0..1}.tar']}\n"
                        "mesh:\n  mp: 8\n")  # fmt: skip
    assert check(run_file).facts["config"] == first
    run_file.write_text(CONFIG.replace("8", "4"))
    assert check(run_file).facts["config"] != first


def test_without_torch_xla_devices_are_a_problem_not_a_crash(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_xla", None)
    report = preflight.Report()
    preflight.check_devices(report, {})
    assert len(report.problems) == 1 and report.problems[0].startswith("devices: ")


def test_devices_and_mesh_are_compared_with_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"local_devices": 8, "devices": 256, "process": 3, "processes": 32}
    monkeypatch.setattr(preflight, "_devices", lambda: found)
    monkeypatch.setenv("WORLD_SIZE", "32")
    report = preflight.Report()
    preflight.check_devices(report, {"mesh": {"dp": 32, "mp": 8}})
    assert report.problems == []
    assert str(report.facts["mesh"]).startswith("dp 32 x mp 8 = 256 devices")

    report = preflight.Report()
    preflight.check_devices(report, {"mesh": {"mp": 16}})
    assert "mesh.mp=16 does not divide the 8 devices of a host" in report.problems[0]

    monkeypatch.setenv("WORLD_SIZE", "64")
    report = preflight.Report()
    preflight.check_devices(report, {})
    assert "torch_xla counts 32, and 64 hosts were started" in report.problems[0]


def test_a_machine_by_itself(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main([str(run_file), "--no-devices"]) == 0
    (run_file.parent / "shards" / "0.tar").unlink()
    assert preflight.main([str(run_file), "--no-devices"]) == 1
    assert "problem: data: " in capsys.readouterr().out


@pytest.mark.xla
def test_virtual_devices_are_counted(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has eight of torch_xla's."""
    assert preflight.main([str(run_file), "--json"]) == 0
    before, after = (json.loads(line.removeprefix(preflight.MARK)) for line in capsys.readouterr().out.splitlines())
    assert "devices" not in before["facts"]
    assert (after["facts"]["devices"], after["facts"]["processes"], after["problems"]) == (8, 1, [])
    assert after["facts"]["mesh"].startswith("dp 1 x mp 8")


def line(**facts: Any) -> str:
    import time

    clock = facts.pop("time", time.time())
    problems = facts.pop("problems", [])
    return preflight.MARK + json.dumps({"facts": facts, "problems": problems, "time": clock})


def test_hosts_that_differ_are_marked() -> None:
    reports = Reports(4)
    for worker in range(4):
        version = "2.8.0" if worker == 2 else "2.9.0"
        reports.read(worker, line(host=f"h{worker}", torch_xla=version, process=worker, free_gb=80.0 + worker))
    rows = [row.split() for row in reports.table().splitlines()]
    assert ["torch_xla", "2.9.0", "0-1,", "3"] in rows
    assert ["!", "2.8.0", "2"] in rows
    assert ["free_gb", "80.0", "to", "83.0", "0-3"] in rows
    assert reports.problems() == ["worker 2: torch_xla is 2.8.0, and 2.9.0 on 0-1, 3"]


def test_a_host_that_lacks_what_others_have_differs() -> None:
    reports = Reports(3)
    for worker in range(3):
        reports.read(worker, line(libtpu=None if worker == 0 else "0.0.21"))
    assert reports.problems() == ["worker 0: libtpu is -, and 0.0.21 on 1-2"]


def test_what_a_host_explains_is_said_once() -> None:
    reports = Reports(3)
    for worker in range(2):
        reports.read(worker, line(data="train 2 shards"))
    reports.read(2, line(data=None, problems=["data: gs://b is not there"]))
    assert reports.problems() == ["worker 2: data: gs://b is not there"]


def test_silence_clocks_and_doubles_are_problems() -> None:
    import time

    reports = Reports(4)
    for worker in range(3):
        reports.read(worker, line(process=0 if worker < 2 else 2, time=time.time() - 60 * (worker == 1)))
    problems = "\n".join(reports.problems())
    assert "worker 3 did not report" in problems
    assert "clocks of worker 1 and " in problems and "60 s apart" in problems
    assert "2 hosts call themselves process 0" in problems
    assert ["!", "no", "report", "-", "3"] in [row.split() for row in reports.table().splitlines()]


def test_one_problem_of_many_hosts_is_one_line() -> None:
    reports = Reports(3)
    for worker in range(3):
        reports.read(worker, line(data=None, problems=["data: gs://b is not there"]))
    assert reports.problems() == ["worker 0-2: data: gs://b is not there"]


def test_other_lines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Reports(1).read(0, "Traceback")
    assert capsys.readouterr().out == "[worker 0] Traceback\n"


def test_spans() -> None:
    assert spans([8, 0, 1, 2, 5]) == "0-2, 5, 8"


@pytest.fixture
def set_up_cloud(cloud: Cloud) -> Cloud:
    """Hosts with the code, a run's file, and shards that they share."""
    (cloud.root / "shards").mkdir()
    (cloud.root / "shards" / "0.tar").write_bytes(b"x")
    for host in range(2):
        folder = cloud.home(host) / "dalle-torch"
        for name in ("launch", "dalle_torch"):
            (folder / name).symlink_to(REPOSITORY / name)
        (folder / "run.yaml").write_text(f"data: {{train: ['{cloud.root}/shards/*.tar']}}\n")
    return cloud


def preflight_words(cloud: Cloud, *more: str) -> list[str]:
    return ["--preflight", "run.yaml", "--no-devices", "--output", str(cloud.root / "run"), *more]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.disk_usage(Path.home()).free < 10e9:
        pytest.skip("less than 10 GB are free here, which the hosts of this test complain of")


@pytest.mark.usefixtures("room")
def test_the_launcher_compares_hosts_and_then_runs(set_up_cloud: Cloud) -> None:
    done = set_up_cloud.run(*preflight_words(set_up_cloud, "--", "echo", "training"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: all is well" in done.stdout
    assert done.stdout.index("all is well") < done.stdout.index("[worker 0] training")
    assert "PREFLIGHT" not in done.stdout


def test_the_launcher_does_not_run_on_hosts_that_differ(set_up_cloud: Cloud) -> None:
    other = set_up_cloud.home(1) / "dalle-torch" / "run.yaml"
    other.write_text(other.read_text() + "training: {steps: 3}\n")
    done = set_up_cloud.run(*preflight_words(set_up_cloud, "--", "echo", "training"))
    assert done.returncode == 1
    (problem,) = [row for row in done.stdout.splitlines() if "config is " in row]
    assert problem.startswith("problem: worker 1: config is ") or problem.startswith("problem: worker 0: config is ")
    assert any(row.startswith("!") for row in done.stdout.splitlines())
    assert "[worker 0] training" not in done.stdout


def test_a_host_without_the_code_is_named(set_up_cloud: Cloud) -> None:
    (set_up_cloud.home(1) / "dalle-torch" / "launch").unlink()
    done = set_up_cloud.run(*preflight_words(set_up_cloud))
    assert done.returncode == 1
    assert "problem: worker 1 did not report" in done.stdout
    assert "can't open file" in done.stderr


def test_a_host_that_hangs_is_named(set_up_cloud: Cloud) -> None:
    slow = set_up_cloud.home(1) / "dalle-torch" / "launch"
    slow.unlink()
    slow.mkdir()
    (slow / "preflight.py").write_text("import time; time.sleep(600)")
    done = set_up_cloud.run(*preflight_words(set_up_cloud, "--preflight-timeout", "5"))
    assert done.returncode == 1
    assert "problem: worker 1 did not report" in done.stdout
    assert "not all hosts were done after 5 s" in done.stdout
