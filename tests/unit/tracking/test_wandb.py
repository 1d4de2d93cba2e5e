"""wandb, offline: what it wrote is what it was told, over a resume, and what goes wrong with it stops no run."""

import json
import logging
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_torch.config import TrackingConfig
from dalle_torch.log import set_rank
from dalle_torch.tracking import Histogram, MultiTracker, NullTracker, start_wandb
from dalle_torch.tracking import wandb as ours

pytest.importorskip("wandb")
OFFLINE = TrackingConfig(wandb="offline", project="shapes", name="first", group="small", tags=["test", "cpu"])


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, position, parts = path.read_bytes(), 1 << 15, 7, b""
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def written(folder: Path) -> list[Any]:
    """All records; wandb's own process may still write the last ones when `finish` has returned."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    for _ in range(200):
        found = [list(records(file)) for file in files]
        if all(any(record.WhichOneof("record_type") == "exit" for record in file) for file in found):
            return [record for file in found for record in file]
        time.sleep(0.1)
    raise AssertionError(f"no end in {files}")


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in written(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def test_what_wandb_has_is_what_it_was_told(tmp_path: Path) -> None:
    tracker = start_wandb(OFFLINE, tmp_path, {"optimizer": {"lr": 0.5}})
    tracker.log({"loss": 1.5, "eval/coco/loss": 2.5}, 10)
    tracker.histograms({"decoder.w": Histogram((3, 4), (0.0, 0.5, 1.0), 5.0)}, 10)
    tracker.images("samples", [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4))], ["red", "black"], 11)
    tracker.event("change", {"name": "optimizer.lr", "old": None, "new": 0.25}, 12)
    tracker.finish("stopped")
    loss, histograms, images, event = history(tmp_path)
    assert (loss["loss"], loss["eval/coco/loss"], loss["step"]) == (1.5, 2.5, 10)
    found = {name.removeprefix("histogram/decoder.w/"): value for name, value in histograms.items()}
    assert (found["_type"], found["values"], found["bins"]) == ("histogram", [3, 4], [0.0, 0.5, 1.0])
    assert histograms["norm/decoder.w"] == 5.0
    assert images["samples/captions"] == ["red", "black"] and images["step"] == 11
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    assert (event["event/change/name"], event["event/change/old"], event["event/change/new"]) == (
        "optimizer.lr", "null", 0.25,
    )  # fmt: skip
    kinds = {record.WhichOneof("record_type"): record for record in written(tmp_path)}
    run = kinds["run"].run
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == (
        "shapes", "first", "small", ["test", "cpu"],
    )  # fmt: skip
    assert {u.key: json.loads(u.value_json) for u in run.config.update}["optimizer"] == {"lr": 0.5}
    assert kinds["exit"].exit.exit_code == 0
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric
        for record in written(tmp_path)
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["*"].step_metric == "step"


def test_a_resumed_run_is_the_same_run_and_no_step_is_dropped(tmp_path: Path) -> None:
    for first in (1, 2):
        tracker = start_wandb(OFFLINE, tmp_path, {}, resumed=first > 1)
        for step in range(first, first + 3):
            tracker.log({"loss": float(first)}, step)
        tracker.finish("stopped")
    steps = [(row["loss"], row["step"]) for row in history(tmp_path)]
    assert sorted(steps) == [(1.0, 1), (1.0, 2), (1.0, 3), (2.0, 2), (2.0, 3), (2.0, 4)]
    ids = {record.run.run_id for record in written(tmp_path) if record.WhichOneof("record_type") == "run"}
    assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    start_wandb(OFFLINE, tmp_path, {}).finish("failed")
    (exit_record,) = [record for record in written(tmp_path) if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit.exit_code == 1


def test_another_project_is_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = ours._run_id(OFFLINE, tmp_path)
    assert ours._run_id(OFFLINE, tmp_path) == first
    assert ours._run_id(TrackingConfig(wandb="offline", project="other"), tmp_path) != first
    (tmp_path / "wandb.json").write_text('{"id": "../x"')
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        assert ours._run_id(OFFLINE, tmp_path).isalnum()
    assert "wandb.json is damaged" in caplog.text


def test_only_the_first_process_has_one_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert isinstance(start_wandb(TrackingConfig(), tmp_path, {}), NullTracker)
    set_rank(1)
    try:
        assert isinstance(start_wandb(OFFLINE, tmp_path, {}), NullTracker)
    finally:
        set_rank(None)
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_installed_is_told_at_the_start_but_stops_no_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="tracking.wandb=offline and wandb is not installed: pip install"):
        start_wandb(OFFLINE, tmp_path, {})
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        assert isinstance(start_wandb(OFFLINE, tmp_path, {}, resumed=True), NullTracker)
    assert "the run goes on without wandb" in caplog.text


def test_a_missing_account_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(PermissionError, match="run `wandb login`, set WANDB_API_KEY, or set tracking.wandb to offline"):
        start_wandb(TrackingConfig(wandb="online"), tmp_path, {})


def test_without_a_server_the_run_is_kept_offline_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real client against a port where nobody listens."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(ours, "START_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        tracker = start_wandb(TrackingConfig(wandb="online"), tmp_path, {})
    assert "wandb cannot be reached" in caplog.text and "wandb sync" in caplog.text
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("finished")
    assert [row["loss"] for row in history(tmp_path)] == [1.0]


class FakeRun:
    """A run of wandb whose network is gone."""

    def __init__(self, hang: threading.Event | None = None) -> None:
        self.summary: dict[str, Any] = {}
        self.hang = hang

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        raise ConnectionError("gone")

    def finish(self, exit_code: int) -> None:
        if self.hang is None:
            raise ConnectionError("gone")
        self.hang.wait(30)


def test_failures_later_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    tracker = MultiTracker([ours.WandbTracker(FakeRun())], max_failures=3)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        tracker.log({"loss": 1.0}, 1)
        tracker.finish("finished")
    assert "WandbTracker failed, the training goes on: ConnectionError: gone" in caplog.text


def test_finish_does_not_hang() -> None:
    never = threading.Event()
    try:
        with pytest.raises(TimeoutError, match="wandb sync"):
            ours.WandbTracker(FakeRun(never), finish_seconds=-9.9).finish("finished")
    finally:
        never.set()
