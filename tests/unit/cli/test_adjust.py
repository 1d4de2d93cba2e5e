"""`dalle-torch adjust`, against a run that takes its requests as a training loop does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from dalle_torch.cli.main import main
from dalle_torch.config import RunConfig
from dalle_torch.config_io import save_config
from dalle_torch.storage.places import Place
from dalle_torch.training.control import History, Mailbox, apply, take_orders
from dalle_torch.training.run_folder import RunFolder
from tests.unit.training.run_configs import run_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    save_config(run_config(), folder.config)
    return folder


@contextmanager
def running(folder: RunFolder, config: RunConfig | None = None, step: int = 1200) -> Iterator[History]:
    """A run in a thread: every step it takes its orders and applies them."""
    done, failures = threading.Event(), []
    history = History(folder.history)

    def loop() -> None:
        now, at, mailbox = config or run_config(), step, Mailbox([str(folder.control)])
        try:
            while not done.wait(0.01):
                orders = take_orders(mailbox, history, now, at)
                now = apply(now, orders.changes)
                orders.confirm(mailbox, at)
                # Steps pass only when something came, so that what is printed can be told beforehand.
                at += bool(orders)
        except Exception as error:
            failures.append(error)

    with folder.acquire():
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield history
        finally:
            done.set()
            thread.join()
            history.close()
    assert not failures


def test_a_change_is_made_and_told_with_its_step(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with running(folder):
        assert main(["adjust", str(folder.path), "learning_rate=5e-5", "log_every=7", "save_every=1000"]) == 0
        out, err = capsys.readouterr()
        assert out == (
            "training.save_every is 1000 already\n"
            "step 1200: optimizer.lr 0.0001 -> 5e-05\n"
            "step 1200: training.log_every 50 -> 7\n"
        )
        assert err == "waiting for the run to take it up at its next step\n"
        # Checked against what holds now, and not against the file of the start.
        assert main(["adjust", str(folder.path), "learning_rate=5e-5"]) == 1
        assert "nothing to change: optimizer.lr is 5e-05 already" in capsys.readouterr().err
        assert main(["adjust", str(folder.path), "save"]) == 0
        assert main(["adjust", str(folder.path), "stop", "log_every=8"]) == 0
    assert capsys.readouterr().out == (
        "step 1201: saves a checkpoint\n"
        "step 1202: training.log_every 7 -> 8\n"
        "step 1202: stops after saving a checkpoint\n"
    )  # fmt: skip
    assert main(["adjust", str(folder.path), "--history"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[2], row[3], row[4]) for row in rows] == [
        ("STEP", "NAME", "OLD", "NEW"), ("1200", "optimizer.lr", "0.0001", "5e-05"),
        ("1200", "training.log_every", "50", "7"), ("1202", "training.log_every", "7", "8"),
    ]  # fmt: skip


def test_a_run_that_has_another_configuration_by_now_refuses_with_the_reason(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(folder, run_config("adafactor")):
        assert main(["adjust", str(folder.path), "beta1=0.5"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "dalle-torch: error: the run refuses: optimizer.beta1 has no effect with optimizer.name=adafactor"


def test_without_a_run_the_request_waits_for_the_next_start(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adjust", str(folder.path), "learning_rate=5e-5"]) == 0
    out, err = capsys.readouterr()
    assert "nothing is running in" in out and "--cancel" in out and err == ""
    assert main(["adjust", str(folder.path), "--show"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is running\n" in shown and "waits: optimizer.lr=5e-05, sent 2" in shown
    with running(folder) as history:
        assert main(["adjust", str(folder.path), "log_every=7"]) == 0
        assert [change.name for change in history] == ["optimizer.lr", "training.log_every"]
        capsys.readouterr()
        assert main(["adjust", str(folder.path), "--show"]) == 0
        assert "running: process " in (shown := capsys.readouterr().out) and "no request waits" in shown


def test_words_are_not_kept_for_a_later_start(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adjust", str(folder.path), "stop"]) == 1
    assert "nothing is running in" in capsys.readouterr().err
    assert Mailbox([str(folder.control)]).pending() == []


def test_requests_can_be_taken_back(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adjust", str(folder.path), "learning_rate=5e-5"]) == 0
    capsys.readouterr()
    assert main(["adjust", str(folder.path), "--cancel"]) == 0
    assert capsys.readouterr().out.startswith("taken back: 2")
    assert main(["adjust", str(folder.path), "--cancel"]) == 0
    assert capsys.readouterr().out == "nothing waits\n"


def test_a_run_that_does_not_answer_is_told_and_the_request_stays(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder.acquire():
        assert main(["adjust", str(folder.path), "log_every=7", "--wait", "0.05"]) == 1
        assert "error: no answer in 0.05 s; the request stays" in capsys.readouterr().err
        assert main(["adjust", str(folder.path), "log_every=8", "--wait", "0"]) == 0
        assert "sent as 2" in capsys.readouterr().out
    assert len(Mailbox([str(folder.control)]).pending()) == 2


def test_the_list_has_what_the_run_has(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adjust", str(folder.path), "--list"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["optimizer.lr"][:3] == ["learning_rate", "0.0001", "highest"]
    assert rows["data.min_clip_score"][:2] == ["min_clip_score", "null"] and {"save", "stop"} <= set(rows)
    assert "optimizer.shampoo.preconditioning_compute_steps" not in rows


def test_a_run_behind_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        url = "memory://bucket/mega"
        save_config(run_config(), f"{url}/config.yaml")
        history, mailbox = History(), Mailbox([f"{url}/control"], remote_seconds=0)
        assert main(["adjust", url, "learning_rate=5e-5", "--wait", "0"]) == 0
        take_orders(mailbox, history, run_config(), 3).confirm(mailbox, 3)
        Place(url).write("history.jsonl", history.dump())
        capsys.readouterr()
        assert main(["adjust", url, "--list"]) == 0
        assert "5e-05" in capsys.readouterr().out
        assert main(["adjust", url, "--show"]) == 0
        assert "cannot be seen from here" in capsys.readouterr().out
    finally:
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to do"),
        (["save", "--list"], "--list goes without settings"),
        (["learning_rat=1"], "did you mean learning_rate"),
        (["learning_rate=-1"], "lr=-1.0 must be at least 0"),
        (["save", "--wait", "-1"], "--wait -1 must be at least 0"),
        (["save", "--wait", "nan"], "--wait nan must be at least 0"),
    ],
)
def test_mistakes_are_one_line(
    folder: RunFolder, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adjust", str(folder.path), *words]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert not list(folder.control.iterdir())


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (str(tmp_path), str(tmp_path / "gone"), "memory://gone"):
        assert main(["adjust", name, "save"]) == 1
        assert f"{name} has no config.yaml, so it is no folder of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: {config: x, optoins: 3}\ndata: {train: [x]}\n")
    assert main(["adjust", str(tmp_path), "save"]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path}/config.yaml" in err and "optoins" in err and err.count("\n") == 1
