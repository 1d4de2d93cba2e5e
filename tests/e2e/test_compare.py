"""`dalle-torch compare`: two variants and two seeds in parallel processes, killed on the way, end as if not."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.training.run import train_run
from tests.tiny_run import options, write_source

STEPS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    source = write_source(folder / "source")
    run = options(
        source, training={"steps": STEPS, "accumulation_steps": 1, "log_every": 5, "eval_every": 20, "save_every": 10}
    )
    rows = [{"name": "Base"}, {"name": "post-LN", "set": {"model.options.ln_positions": "postln"}}]
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({"title": "Tiny", "run": run, "rows": rows, "seeds": [0, 1]}))
    return file


def start(config: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dalle_torch.cli.main", "compare", str(config), "--output", str(output), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(config: Path, output: Path, *more: str, status: int = 0) -> str:
    process = start(config, output, *more)
    out, error = process.communicate(timeout=300)
    assert process.returncode == status, error
    return out + error


def wait_for(process: subprocess.Popen[str], pattern: str, folder: Path, count: int) -> None:
    limit = time.monotonic() + 200
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)


def test_killed_and_resumed_it_ends_as_an_unbroken_one(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed = start(config, output, "--jobs", "2")
    wait_for(killed, "runs/*/checkpoints/step-*", output, count=2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    interrupted = start(config, output, "--jobs", "2")
    wait_for(interrupted, "runs/*/result.json", output, count=2)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130
    finished = {file: file.stat().st_mtime_ns for file in output.glob("runs/*/result.json")}
    assert 2 <= len(finished) <= 4

    out = run(config, output, "--jobs", "2")
    assert all(file.stat().st_mtime_ns == before for file, before in finished.items()), "finished runs were run again"
    assert "post-LN" in out and "chance" in out

    rows = list(csv.DictReader((output / "comparison.csv").open()))
    assert [row["name"] for row in rows] == ["Base", "post-LN"]
    told = json.loads((output / "comparison.json").read_text())
    assert told["missing_runs"] == 0
    for row in told["rows"]:
        assert sorted(one["seed"] for one in row["runs"]) == [0, 1] and row["loss"] < told["chance"] + 1
        for one in row["runs"]:
            assert one["measured"]["steps"] == list(range(20, STEPS + 1, 20)) and one["error"] is None
    # The runs that were broken are those that one process would have made.
    planned = load_config(RunConfig, output / "runs" / "base-seed0" / "planned.yaml")
    assert train_run(planned, tmp_path / "whole") == "finished"
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in whole if "eval_loss" in row]
    assert told["rows"][0]["runs"][0]["measured"]["losses"] == losses
    page = (output / "report.html").read_text()
    assert "post-LN" in page and 'src="http' not in page

    # A report alone trains nothing, and says the same.
    before = (output / "comparison.csv").read_bytes()
    run(config, output, "--report-only")
    assert (output / "comparison.csv").read_bytes() == before


def test_what_is_wrong_is_one_line(config: Path, tmp_path: Path) -> None:
    for more, message in (
        (("--report-only",), "has no finished run of this comparison"),
        (("--set", "run.training.stepz=3"), "did you mean steps?"),
        (("--jobs", "0"), "--jobs 0 must be at least 1"),
        (("--set", "run.data.train=[nowhere]"), "nowhere"),
    ):
        out = run(config, tmp_path / "none", *more, status=1)
        assert message in out and len(out.splitlines()) == 1, out
    missing = tmp_path / "missing.yaml"
    assert "is not there" in run(missing, tmp_path / "none", status=1)
    assert not list((tmp_path / "none").glob("runs/*"))
