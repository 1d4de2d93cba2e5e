"""metrics.jsonl: one curve, valid JSON, whole lines."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_torch.tracking import Histogram, JsonLinesTracker


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_kind_of_event_is_one_line_with_step_and_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonLinesTracker(path, pictures=tmp_path / "samples")
    tracker.log({"loss": 1.5, "tokens": 7, "lr": np.float32(0.25), "norm": torch.tensor(2.0)}, 1)
    tracker.histograms({"w": Histogram((1, 2), (0.0, 0.5, 1.0), math.inf)}, 1)
    tracker.images("samples/eval", [Image.new("RGB", (4, 4), "red")], ["ein rotes Viereck ■"], 2)
    tracker.event("change", {"name": "optimizer.lr", "old": 1.0, "new": None, "step": 99}, 3)
    tracker.finish("finished")
    metrics, histograms, images, event = rows(path)
    assert {k: v for k, v in metrics.items() if k != "time"} == {
        "step": 1, "loss": 1.5, "tokens": 7, "lr": 0.25, "norm": 2.0,
    }  # fmt: skip
    assert abs((datetime.now(UTC) - datetime.fromisoformat(metrics["time"])).total_seconds()) < 3600
    assert histograms["histograms"] == {"w": {"counts": [1, 2], "edges": [0.0, 0.5, 1.0], "norm": None}}
    assert images["captions"] == ["ein rotes Viereck ■"]
    assert Image.open(tmp_path / "samples" / images["files"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert (event["event"], event["step"], event["new"]) == ("change", 3, None)


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log({"loss": math.nan, "norm": math.inf, "lr": 1.0}, 1)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["norm"], row["lr"]) == (None, None, 1.0)
    assert row["nonfinite"] == {"loss": "nan", "norm": "inf"}


def test_a_resumed_run_goes_on_with_one_curve_and_loses_nothing(tmp_path: Path) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.superseded.jsonl"
    for start, stop, value in ((0, 6, 1.0), (3, 8, 2.0), (2, 4, 3.0), (4, 5, 4.0)):
        tracker = JsonLinesTracker(path, step=start)
        for step in range(start + 1, stop + 1):
            tracker.log({"loss": value}, step)
        tracker.finish("stopped")
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 4.0)]
    moved = [(4, 1.0), (5, 1.0), (6, 1.0), (3, 1.0), *((step, 2.0) for step in range(4, 9))]
    assert [(row["step"], row["loss"]) for row in rows(aside)] == moved


def test_foreign_lines_stay_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('no json\n[1]\n{"step": "x"}\n{"step": 9}\n')
    assert JsonLinesTracker(path, step=5).superseded == 1
    assert path.read_text() == 'no json\n[1]\n{"step": "x"}\n'


def test_lines_of_a_process_that_was_killed_are_there_and_a_torn_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
        import os, pathlib
        from dalle_torch.tracking import JsonLinesTracker
        tracker = JsonLinesTracker(pathlib.Path({str(path)!r}))
        for step in (1, 2, 3):
            tracker.log({{"loss": 0.5}}, step)
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    tracker = JsonLinesTracker(path, step=3)
    tracker.log({"loss": 0.25}, 4)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]


def test_a_histogram_has_an_edge_more_than_bins() -> None:
    with pytest.raises(ValueError, match="2 bins have 3 edges, and not 2"):
        Histogram((1, 2), (0.0, 1.0), 1.0)
