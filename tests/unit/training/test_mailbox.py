"""Requests on their way: whole, in order, from anywhere; what is no request harms nobody."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle_torch.storage.places import Place
from dalle_torch.training.control import Mailbox, Request, changes_of, parse_request
from tests.unit.training.run_configs import run_config

CONFIG = run_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control"


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://bucket/run/control"
    fsspec.filesystem("memory").store.clear()


def request(*words: str) -> Request:
    return parse_request(words or ["learning_rate=5e-5"], CONFIG)


def test_requests_arrive_in_the_order_of_sending_and_are_answered_once(folder: Path) -> None:
    there, here = Mailbox([str(folder)]), Mailbox([str(folder)])
    sent = [request(f"log_every={i}") for i in range(1, 6)]
    for one in reversed(sent):
        there.send(one)
    assert here.pending() == sent == here.pending()
    changes = changes_of(sent[0], CONFIG, 3)
    here.done(sent[0], changes, 3)
    here.done(sent[1], "no", 3)
    assert here.pending() == sent[2:] == Mailbox([str(folder)]).pending()
    answer, refusal = there.answer(sent[0].id), there.answer(sent[1].id)
    assert answer and refusal
    assert (list(answer.changes), answer.error, answer.step) == (changes, None, 3)
    assert (list(refusal.changes), refusal.error) == ([], "no")
    assert there.answer(sent[2].id) is None


def test_both_folders_are_looked_into_and_one_behind_a_url_only_now_and_then(folder: Path, url: str) -> None:
    time = [0.0]
    here = Mailbox([str(folder), url], remote_seconds=5, clock=lambda: time[0])
    first, second = request("log_every=1"), request("log_every=2")
    assert here.pending() == []
    Mailbox([url]).send(first)
    Mailbox([str(folder)]).send(second)
    assert here.pending() == [second]
    time[0] = 5.0
    assert here.pending() == [first, second]
    here.done(first, [], 1)
    answer = Mailbox([url]).answer(first.id)
    assert answer and answer.error is None
    time[0] = 10.0
    assert here.pending() == [second]


def test_a_network_that_fails_is_one_warning_and_asked_less_and_less(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, time = [], [0.0]

    def fail(self: Place) -> list[str]:
        calls.append(time[0])
        raise OSError("no network")

    monkeypatch.setattr(Place, "names", fail)
    here = Mailbox([url], remote_seconds=5, clock=lambda: time[0])
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        for second in range(100):
            time[0] = float(second)
            assert here.pending() == []
    assert calls == [0.0, 10.0, 30.0, 70.0]
    assert len(caplog.records) == 1


def test_a_sender_killed_in_the_middle_leaves_nothing_that_is_taken_up(folder: Path) -> None:
    """Before the rename that ends the write, where the data are on disk already."""
    code = f"""
        import os, signal
        from dalle_torch.training.control import Mailbox, parse_request
        from tests.unit.training.run_configs import run_config
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Mailbox([{str(folder)!r}]).send(parse_request(["log_every=3"], run_config()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".tmp-") for path in folder.iterdir())
    assert Mailbox([str(folder)]).pending() == []
    assert not (folder / "rejected").exists()


def test_two_senders_at_once_lose_nothing(folder: Path) -> None:
    code = f"""
        from dalle_torch.training.control import Mailbox, parse_request
        from tests.unit.training.run_configs import run_config
        for i in range(20):
            Mailbox([{str(folder)!r}]).send(parse_request([f"log_every={{i + 1}}"], run_config()))
    """
    senders = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) for _ in range(2)]
    here, seen = Mailbox([str(folder)]), set()
    while any(sender.poll() is None for sender in senders):
        for one in here.pending():
            here.done(one, [], 0)
            seen.add(one.id)
    for one in here.pending():
        here.done(one, [], 0)
        seen.add(one.id)
    assert [sender.returncode for sender in senders] == [0, 0]
    assert len(seen) == 40 and here.pending() == []
    assert not (folder / "rejected").exists()


def good() -> dict:
    return request().to_json()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"hello", "requests are files .json"),
        ("x.json", b"{", "Expecting"),
        ("x.json", b"\x80{}", "decode"),
        ("x.json", b"[" * 50_000, ""),
        ("x.json", b" " * 70_000, "at most 65536 bytes"),
        ("x.json", b"[1]", "JSON object"),
        ("x.json", json.dumps(good() | {"settings": {}}).encode(), "asks for something"),
        ("x.json", json.dumps(good() | {"more": 1}).encode(), "a request has"),
        ("x.json", json.dumps(good() | {"words": ["quit"]}).encode(), "are not of save, stop"),
        ("x.json", json.dumps(good() | {"settings": {"training.steps": 1}}).encode(), "cannot be adjusted"),
        ("x.json", json.dumps(good() | {"settings": {"optimizer.lr": "1"}}).encode(), "not a finite number"),
        ("x.json", json.dumps(good() | {"settings": {"optimizer.lr": True}}).encode(), "not a finite number"),
        ("x.json", json.dumps(good() | {"settings": {"optimizer.lr": float("nan")}}).encode(), "not a finite number"),
        ("x.json", json.dumps(good() | {"by": "a\nb"}).encode(), "by is not a short text"),
        ("x.json", json.dumps(good() | {"id": "../../x"}).encode(), "none of a request"),
        ("x.json", json.dumps(good()).encode(), "is not the file's name"),
    ],
)
def test_what_is_no_request_is_moved_away_with_the_reason(
    folder: Path, name: str, content: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    here, real = Mailbox([str(folder)]), request()
    here.send(real)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        assert here.pending() == [real]
    assert reason in (folder / "rejected" / f"{name}.reason").read_text()
    assert (folder / "rejected" / name).read_bytes() == content
    assert "is no request and was moved to rejected" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{real.id}.json", "rejected"])


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.sampled_from(sorted(good())), value=json_values, raw=st.binary(max_size=30), whole=st.booleans())
def test_no_content_makes_it_raise(folder: Path, key: str, value: object, raw: bytes, whole: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    row = good() | {key: value}
    (folder / f"{good()['id']}.json").write_bytes(json.dumps(row).encode() if whole else raw)
    for found in Mailbox([str(folder)]).pending():
        assert found == Request.from_json(found.to_json())
        Mailbox([str(folder)]).done(found, [], 0)


def test_a_folder_that_cannot_be_written_is_a_warning_and_no_request_is_taken_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, one = Mailbox([str(folder)]), request()
    here.send(one)
    (folder / "foreign.txt").write_text("x")

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for method in ("write", "move", "remove"):
        monkeypatch.setattr(Place, method, fail)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        assert here.pending() == [one]
        here.done(one, [], 0)
        assert here.pending() == [] == here.pending()
    assert len(caplog.records) == 3


def test_requests_that_wait_can_be_taken_back(folder: Path) -> None:
    here = Mailbox([str(folder)])
    ids = [here.send(request(f"log_every={i}")) for i in (1, 2)]
    assert here.cancel() == ids and here.pending() == [] and here.cancel() == []


def test_folders_and_links_in_the_mailbox_are_harmless(folder: Path, tmp_path: Path) -> None:
    (folder / "archive.json").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("keep")
    os.symlink(secret, folder / "link.json")
    assert Mailbox([str(folder)]).pending() == []
    assert secret.read_text() == "keep" and (folder / "archive.json").is_dir()
