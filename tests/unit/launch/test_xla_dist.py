"""The launcher as it is run, with real processes and signals; only gcloud is a stand-in."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.unit.launch.conftest import NAME, ZONE, Cloud, alive, wait_for

ALARM = "import signal,time,os,sys; open('pid','w').write(str(os.getpid())); "
SAVES = (
    ALARM + "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open('saved','w').write('x'), sys.exit(0))); "
    "print('up', flush=True); time.sleep(600)"
)
STUBBORN = ALARM + "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True)); print('up', flush=True)\n" + (
    "while True: time.sleep(600)"
)  # fmt: skip


def up(cloud: Cloud, hosts: int = 2) -> None:
    """Wait until the command says "up" on every host."""
    for host in range(hosts):
        wait_for(lambda host=host: "up\n" in cloud.log(host) if log_exists(cloud, host) else False, f"host {host} up")


def calls_exist(cloud: Cloud) -> bool:
    return (cloud.root / "calls.jsonl").exists()


def log_exists(cloud: Cloud, host: int) -> bool:
    return (cloud.root / "logs" / f"worker-{host:03d}.log").exists()


def test_every_host_gets_its_own_rank_and_the_address_of_the_first(cloud: Cloud) -> None:
    done = cloud.run("--", "sh", "-c", "echo $RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $PJRT_DEVICE $(pwd)")
    assert done.returncode == 0, done.stderr
    for host in range(2):
        line = f"{host}/2 10.164.0.2:29500 TPU {cloud.home(host) / 'dalle-torch'}"
        assert f"[worker {host}] {line}" in done.stdout.splitlines()
        assert line in cloud.log(host).splitlines()
    assert "\x1e" not in done.stdout + cloud.log(0)


def test_variables_are_set_over_the_launchers_own_and_secrets_stay_out_of_command_lines(cloud: Cloud) -> None:
    done = cloud.run(
        "--env", "PJRT_DEVICE=CPU", "--env", "SECRET", "--env", "ODD=a b'c\"$HOME\n=é", "--master-port", "1234",
        "--", "python", "-c", "import os,json; print(json.dumps([os.environ[k] for k in ('PJRT_DEVICE','SECRET','ODD',"
        "'MASTER_PORT')]))", SECRET="hunter2",
    )  # fmt: skip
    lines = [line.removeprefix("[worker 1] ") for line in done.stdout.splitlines() if line.startswith("[worker 1] [")]
    assert json.loads(lines[0]) == ["CPU", "hunter2", "a b'c\"$HOME\n=é", "1234"]
    assert "hunter2" not in json.dumps(cloud.calls)


def test_arguments_arrive_as_they_were_given(cloud: Cloud) -> None:
    nasty = ["", " ", "a b", "it's", '"', "$HOME `id` $(id)", "; exit 3", "\\", "*", "--", "-x", "é\n2", "#", "&& ||"]
    done = cloud.run("--", "python", "-c", "import sys,json; print(json.dumps(sys.argv[1:]))", *nasty)
    lines = [line.removeprefix("[worker 0] ") for line in done.stdout.splitlines() if line.startswith("[worker 0] [")]
    assert json.loads(lines[0]) == nasty


def test_the_environment_in_the_folder_comes_first(cloud: Cloud) -> None:
    programs = cloud.home(0) / "dalle-torch" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "dalle-torch").write_text("#!/bin/sh\necho $VIRTUAL_ENV $@\n")
    (programs / "dalle-torch").chmod(0o755)
    shutil.copytree(programs.parent, cloud.home(1) / "dalle-torch" / ".venv")
    done = cloud.run("--", "dalle-torch", "train")
    assert f"[worker 0] {programs.parent} train" in done.stdout


def test_a_failing_host_stops_the_others_and_shows_its_tail(cloud: Cloud) -> None:
    script = "if [ $RANK = 1 ]; then sleep 0.5; echo the reason; exit 7; fi; echo $$ > pid; exec sleep 600"
    done = cloud.run("--", "sh", "-c", script)
    assert done.returncode == 7
    assert "worker 1 ended with status 7; its last lines" in done.stderr
    assert "    the reason\n" in done.stderr
    assert not alive(cloud.pid(0))


def test_a_host_that_cannot_be_reached_stops_the_others(cloud: Cloud) -> None:
    (cloud.root / "unreachable-1").touch()
    done = cloud.run("--", "sleep", "600")
    assert done.returncode == 255
    assert "worker 1 could not be reached" in done.stderr
    assert "Connection timed out" in done.stderr.split("its last lines")[1]


def test_a_broken_connection_is_a_failure_and_never_a_second_run(cloud: Cloud) -> None:
    """gcloud would start the command anew, beside the one that still runs."""
    launched = cloud.start("--grace", "5", "--", "python", "-c", "open('starts','a').write('x'); " + SAVES)
    up(cloud)
    pids = [cloud.pid(host) for host in range(2)]
    (cloud.root / "drop-0").touch()
    done = cloud.finish(launched)
    assert done.returncode == 255
    assert "worker 0 lost its connection" in done.stderr
    wait_for(lambda: not any(map(alive, pids)), "the end of both commands")
    for host in range(2):
        folder = cloud.home(host) / "dalle-torch"
        assert ((folder / "starts").read_text(), (folder / "saved").read_text()) == ("x", "x")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_host_save_before_the_launcher_ends(cloud: Cloud, number: int, status: int) -> None:
    launched = cloud.start("--", "python", "-c", SAVES)
    up(cloud)
    launched.send_signal(number)
    done = cloud.finish(launched)
    assert done.returncode == status
    for host in range(2):
        assert (cloud.home(host) / "dalle-torch" / "saved").exists()
        assert not alive(cloud.pid(host))


def test_a_second_ctrl_c_kills(cloud: Cloud) -> None:
    launched = cloud.start("--", "python", "-c", STUBBORN)
    up(cloud)
    launched.send_signal(signal.SIGINT)
    for host in range(2):
        wait_for(lambda host=host: "no\n" in cloud.log(host), "SIGTERM on the host")
    launched.send_signal(signal.SIGINT)
    assert cloud.finish(launched).returncode == 130
    assert not any(alive(cloud.pid(host)) for host in range(2))


def test_what_does_not_stop_in_time_is_killed(cloud: Cloud) -> None:
    launched = cloud.start("--grace", "0.5", "--", "python", "-c", STUBBORN)
    up(cloud)
    launched.send_signal(signal.SIGTERM)
    assert cloud.finish(launched).returncode == 143
    assert "no\n" in cloud.log(0)
    assert not any(alive(cloud.pid(host)) for host in range(2))


def test_nothing_outlives_a_launcher_that_was_killed(cloud: Cloud) -> None:
    launched = cloud.start("--", "python", "-c", SAVES)
    up(cloud)
    launched.kill()
    for host in range(2):
        wait_for(lambda host=host: not alive(cloud.pid(host)), "the command's end")
        assert (cloud.home(host) / "dalle-torch" / "saved").exists()


def test_failures_are_tried_again_as_often_as_allowed(cloud: Cloud) -> None:
    script = 'echo x >> starts; [ $RANK = 0 ] || exec sleep 2; [ "$(wc -l < starts)" -ge 3 ] || exit 4'
    done = cloud.run("--restart-on-failure", "2", "--backoff", "0.1", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert (cloud.home(0) / "dalle-torch" / "starts").read_text() == "x\n" * 3
    assert "attempt 3 on 2 hosts" in done.stderr

    done = cloud.run("--restart-on-failure", "1", "--backoff", "0.1", "--", "sh", "-c", "echo x >> tries; exit 4")
    assert done.returncode == 4
    assert (cloud.home(0) / "dalle-torch" / "tries").read_text() == "x\n" * 2
    assert "--restart-on-failure 1 is used up" in done.stderr


def test_failures_after_a_healthy_stretch_are_counted_anew(cloud: Cloud) -> None:
    script = 'echo x >> starts; sleep 0.2; [ "$(wc -l < starts)" -ge 4 ] || exit 4'
    words = ["--restart-on-failure", "1", "--reset-after", "0.001", "--backoff", "0.1"]
    assert cloud.run(*words, "--", "sh", "-c", script).returncode == 0


@pytest.mark.parametrize("command", [["no-such-command"], ["sh", "-c", "exit 2"]])
def test_what_would_fail_alike_is_not_tried_again(cloud: Cloud, command: list[str]) -> None:
    done = cloud.run("--restart-on-failure", "3", "--", *command)
    assert done.returncode in (127, 2)
    assert "would come again" in done.stderr


def test_a_restart_ends_what_a_lost_connection_left_behind(cloud: Cloud) -> None:
    code = (
        "import os; n = len(open('starts').read()) if os.path.exists('starts') else 0; open('starts','a').write('x')\n"
    )
    code += "if n: sys.exit(0)\n"
    launched = cloud.start(
        "--restart-on-failure", "1", "--backoff", "0.1", "--failure-grace", "5", "--",
        "python", "-c", "import sys; " + code + SAVES,
    )  # fmt: skip
    up(cloud)
    (cloud.root / "drop-1").touch()
    done = cloud.finish(launched)
    assert done.returncode == 0, done.stderr
    assert not any(alive(cloud.pid(host)) for host in range(2))


def test_a_host_runs_one_command_at_a_time(cloud: Cloud) -> None:
    first = cloud.start("--", "python", "-c", SAVES)
    up(cloud)
    second = cloud.run("--log-dir", str(cloud.root / "other"), "--", "echo", "hello")
    assert second.returncode == 73
    assert "this host is busy with a command of run" in second.stderr and "--takeover" in second.stderr
    assert first.poll() is None

    third = cloud.run("--log-dir", str(cloud.root / "other"), "--takeover", "--", "echo", "hello")
    assert third.returncode == 0, third.stderr
    assert (cloud.home(0) / "dalle-torch" / "saved").exists()
    # Its command ended well, as it does when it is told to stop.
    assert cloud.finish(first).returncode == 0


def test_children_of_the_command_go_with_it(cloud: Cloud) -> None:
    """One in the command's group, and one in a session of its own; both are left until the command has saved."""
    child = "import subprocess as s; "
    child += "a = s.Popen(['sleep','600']); b = s.Popen(['sleep','600'], start_new_session=True); "
    child += "open('a-pid','w').write(str(a.pid)); open('b-pid','w').write(str(b.pid)); "
    saves = SAVES.replace("open('saved','w')", "open('alive','w').write(str([a.poll(), b.poll()])), open('saved','w')")
    launched = cloud.start("--", "python", "-c", child + saves)
    up(cloud)
    launched.send_signal(signal.SIGINT)
    assert cloud.finish(launched).returncode == 130
    for host in range(2):
        assert (cloud.home(host) / "dalle-torch" / "alive").read_text() == "[None, None]"
        assert not alive(cloud.pid(host, "a-pid")) and not alive(cloud.pid(host, "b-pid"))


def test_children_are_ended_after_a_command_that_ends_by_itself(cloud: Cloud) -> None:
    done = cloud.run("--", "sh", "-c", "sleep 600 & echo $! > pid")
    assert done.returncode == 0
    assert not any(alive(cloud.pid(host)) for host in range(2))


@pytest.mark.parametrize(("script", "status"), [("exit 255", 254), ("kill -9 $$", 137)])
def test_statuses_are_those_of_the_command(cloud: Cloud, script: str, status: int) -> None:
    """255 is ssh's own, for a lost connection."""
    assert cloud.run("--", "sh", "-c", script).returncode == status


def test_output_without_a_last_newline_is_whole(cloud: Cloud) -> None:
    done = cloud.run("--", "printf", "one\\ntwo")
    assert done.returncode == 0
    assert {"[worker 0] one", "[worker 0] two"} <= set(done.stdout.splitlines())


def test_a_host_that_was_not_set_up_says_so(cloud: Cloud) -> None:
    (cloud.home(1) / "dalle-torch").rmdir()
    done = cloud.run("--", "true")
    assert done.returncode == 72
    assert "dalle-torch is not there: run launch/setup.sh" in done.stderr


def test_without_gcloud_it_says_what_to_install(cloud: Cloud) -> None:
    done = cloud.run("--", "true", PATH=str(cloud.root / "host-bin"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "gcloud is not on the PATH: install" in done.stderr


def test_a_wrong_zone_is_one_line_of_gclouds(cloud: Cloud) -> None:
    done = cloud.run("--", "true", zone="us-central1-f")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"gcloud knows no TPU {NAME} in zone us-central1-f" in done.stderr and "NOT_FOUND" in done.stderr


@pytest.mark.parametrize(
    ("state", "advice"),
    [("PREEMPTED", "launch/create.sh"), ("STOPPED", "tpu-vm start"), ("CREATING", "--wait-ready")],
)
def test_a_tpu_that_is_not_ready_has_a_status_of_its_own(cloud: Cloud, state: str, advice: str) -> None:
    cloud.describe(state)
    done = cloud.run("--", "true")
    assert done.returncode == 75
    assert f"{NAME} is {state}" in done.stderr and advice in done.stderr


def test_it_waits_for_a_tpu_that_comes(cloud: Cloud) -> None:
    cloud.describe("CREATING")
    launched = cloud.start("--wait-ready", "0.05", "--", "echo", "hello")
    wait_for(lambda: calls_exist(cloud) and len(cloud.calls) > 1, "a second look")
    cloud.describe("READY")
    done = cloud.finish(launched)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is CREATING: waiting up to 0.05 min" in done.stderr


def test_it_does_not_wait_for_ever(cloud: Cloud) -> None:
    cloud.describe("CREATING")
    done = cloud.run("--wait-ready", "0.01", "--", "true")
    assert done.returncode == 75 and "after 0.01 min" in done.stderr


def test_a_preemption_is_told_apart_from_a_failure(cloud: Cloud) -> None:
    launched = cloud.start("--restart-on-failure", "5", "--", "python", "-c", SAVES)
    up(cloud)
    cloud.describe("PREEMPTED")
    (cloud.root / "drop-0").touch()
    done = cloud.finish(launched)
    assert done.returncode == 75
    assert f"{NAME} is PREEMPTED: its machines were taken away" in done.stderr
    assert "attempt 2" not in done.stderr


def test_hosts_that_notice_a_preemption_first_may_save_and_are_believed(cloud: Cloud) -> None:
    """One ends by SIGTERM's status, as training does at a TPU's notice, while the other still saves, longer than
    after a failure; gcloud says READY for another while."""
    slow = f"import os\nif os.environ['RANK'] == '0': {ALARM} time.sleep(1); sys.exit(143)\n"
    saves = SAVES.replace("0.3", "1.5")
    launched = cloud.start("--failure-grace", "0.1", "--settle", "60", "--", "python", "-c", slow + saves)
    wait_for(
        lambda: sum("describe" in call for call in cloud.calls) > 1 if calls_exist(cloud) else False, "a second look"
    )
    assert (cloud.home(1) / "dalle-torch" / "saved").exists()
    cloud.describe("PREEMPTED")
    done = cloud.finish(launched)
    assert done.returncode == 75
    assert f"{NAME} is PREEMPTED" in done.stderr


def test_after_a_preemption_it_goes_on_when_the_tpu_is_back(cloud: Cloud) -> None:
    """Without --restart-on-failure: it was no failure."""
    code = "import os,sys\nif os.path.exists('saved'): sys.exit(0)\n"
    launched = cloud.start("--wait-ready", "0.2", "--failure-grace", "5", "--", "python", "-c", code + SAVES)
    up(cloud)
    cloud.describe("PREEMPTED")
    (cloud.root / "drop-0").touch()
    wait_for(lambda: sum("describe" in call for call in cloud.calls) > 2, "a look at the TPU")
    cloud.describe("READY")
    done = cloud.finish(launched)
    assert done.returncode == 0, done.stderr
    assert "attempt 2 on 2 hosts" in done.stderr


def test_a_signal_ends_the_wait(cloud: Cloud) -> None:
    cloud.describe("CREATING")
    launched = cloud.start("--wait-ready", "10", "--", "true")
    wait_for(lambda: calls_exist(cloud), "a look at the TPU")
    launched.send_signal(signal.SIGINT)
    assert cloud.finish(launched).returncode == 130


def test_ways_to_the_hosts(cloud: Cloud) -> None:
    cloud.run("--project", "p", "--internal-ip", "--ssh-flag=-o LogLevel=ERROR", "--", "true")
    calls = [call for call in cloud.calls if "ssh" in call]
    assert sorted(word for call in calls for word in call if word.startswith("--worker")) == [
        "--worker=0",
        "--worker=1",
    ]
    for call in calls:
        assert {f"--zone={ZONE}", "--project=p", "--internal-ip", "--ssh-flag=-o LogLevel=ERROR", "--quiet"} <= set(
            call
        )
        assert "--ssh-flag=-o ServerAliveInterval=30" in call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command: put it after --"),
        (["--env", "1A=2", "--", "true"], "is not K=V"),
        (["--env", "SURELY_NOT_SET", "--", "true"], "SURELY_NOT_SET is not set here"),
        (["--grace", "-1", "--", "true"], "is no number from 0 on"),
        (["--lease", "0", "--", "true"], "is no number above 0"),
        (["--restart-on-failure", "x", "--", "true"], "is no whole number"),
        (["--iap", "--internal-ip", "--", "true"], "take one"),
    ],
)
def test_a_misspelt_command_line_is_one_line(cloud: Cloud, words: list[str], message: str) -> None:
    done = cloud.run(*words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_help_needs_nothing(cloud: Cloud) -> None:
    done = cloud.run("--help", PATH="")
    assert done.returncode == 0
    for option in ("--restart-on-failure", "--preflight", "--grace", "Exit status"):
        assert option in done.stdout


def test_the_launcher_and_what_it_sends_need_no_package() -> None:
    """The machine it runs on may have neither torch nor this package installed."""
    import subprocess

    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(root / "launch" / "xla_dist.py"), "--help"], capture_output=True, check=False
    )
    assert done.returncode == 0
