"""A comparison in its folder: what is done, what is not done again, what is refused; training is stood in for."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dalle_torch.config import RunConfig
from dalle_torch.config_io import load_config
from dalle_torch.studies import compare
from dalle_torch.studies.compare import Study, save_results
from dalle_torch.studies.compare_config import ComparisonConfig, Row
from dalle_torch.studies.compare_report import write_report
from tests.tiny_run import options, write_source
from tests.unit.studies.results import fields_of

VOCABULARY = 23
"""Image tokens of the tiny model; its data use 20."""
LOSSES = {0.1: 2.0, 0.2: 1.5, 0.4: 1.8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


class Pool:
    """Writes results where `run_all` would train, and fails where it is told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: set[str] = set()

    def __call__(self, folders: Sequence[Path], jobs: int, done: Callable[[Path], None]) -> dict[Path, str]:
        for folder in folders:
            self.ran.append(folder.name)
            if folder.name not in self.failing:
                lr = load_config(RunConfig, folder / "planned.yaml").optimizer.lr
                loss = LOSSES.get(lr, 2.0)
                (folder / "result.json").write_text(json.dumps(fields_of([3.0, loss])))
                done(folder)
        return {folder: "no good" for folder in folders if folder.name in self.failing}


def guess(source: Path) -> float:
    """The loss of the frequencies of tokens, from the members of the tars themselves."""
    counted = []
    for name in ("shards", "valid"):
        counts = np.zeros(20)
        for file in (source / name).glob("*.tar"):
            with tarfile.open(file) as archive:
                for member in archive:
                    if member.name.endswith(".npy"):
                        content = archive.extractfile(member)
                        assert content is not None
                        np.add.at(counts, np.load(io.BytesIO(content.read())).astype(int).ravel(), 1)
        counted.append(counts)
    train, valid = counted
    frequencies = np.concatenate([train + 1, np.ones(VOCABULARY - 20)])
    return float(-(valid / valid.sum() * np.log(frequencies / frequencies.sum())[:20]).sum())


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(compare, "run_all", made)
    return made


def config(source: Path, steps: int = 6, seeds: Sequence[int] = (0, 1)) -> ComparisonConfig:
    run = options(source, training={"steps": steps})
    rows = [Row(name="base"), Row(name="rates", learning_rates=[0.1, 0.2, 0.4])]
    return ComparisonConfig(title="Mine", run=run, rows=rows, seeds=list(seeds))


def test_the_best_rate_of_the_first_seed_goes_on_with_the_others(source: Path, tmp_path: Path, pool: Pool) -> None:
    study = Study(config(source), tmp_path)
    assert study.train(jobs=1) == {}
    assert pool.ran == [
        "base-seed0", "rates-lr0.1-seed0", "rates-lr0.2-seed0", "rates-lr0.4-seed0", "base-seed1", "rates-lr0.2-seed1"
    ]  # fmt: skip
    found = study.results()
    assert [row.loss for row in found.rows] == [2.0, 1.5] and found.missing == 0
    assert found.rows[1].lr == 0.2 and found.rows[1].rates == LOSSES
    assert found.chance == pytest.approx(guess(source), rel=1e-12)


def test_what_is_done_is_not_done_again(source: Path, tmp_path: Path, pool: Pool) -> None:
    pool.failing = {"base-seed0"}
    assert Study(config(source), tmp_path).train(jobs=1) == {"base-seed0": "no good"}
    assert Study(config(source), tmp_path).results().missing == 1
    pool.ran, pool.failing = [], set()
    assert Study(config(source), tmp_path).train(jobs=1) == {}
    assert pool.ran == ["base-seed0"]
    # Another seed is new, and nothing else is.
    pool.ran = []
    Study(config(source, seeds=(0, 1, 2)), tmp_path).train(jobs=1)
    assert pool.ran == ["base-seed2", "rates-lr0.2-seed2"]


def test_rows_and_seeds_can_be_trained_alone(source: Path, tmp_path: Path, pool: Pool) -> None:
    study = Study(config(source), tmp_path)
    study.train(jobs=1, rows=["Base"], seeds=[1])
    # Which rate goes on is not known before the first seed.
    with pytest.raises(ValueError, match=r"rate of rates is chosen by the runs with seed 0, .*: train those first"):
        study.train(jobs=1, rows=["rates"], seeds=[1])
    assert pool.ran == ["base-seed1"]
    study.train(jobs=1, rows=["rates"])
    assert pool.ran[1:] == ["rates-lr0.1-seed0", "rates-lr0.2-seed0", "rates-lr0.4-seed0", "rates-lr0.2-seed1"]
    found = study.results()
    assert found.missing == 1 and found.rows[1].verdict == "one seed alone"
    with pytest.raises(ValueError, match="nobody: no such row; there are base, rates"):
        study.train(jobs=1, rows=["nobody"])
    with pytest.raises(ValueError, match=r"seed 7 is not in seeds=\[0, 1\]"):
        study.train(jobs=1, seeds=[7])


def test_runs_of_other_settings_are_refused_or_trained_anew(source: Path, tmp_path: Path, pool: Pool) -> None:
    Study(config(source), tmp_path).train(jobs=1)
    (tmp_path / "runs" / "base-seed0" / "left").touch()
    with pytest.raises(ValueError, match=r"6 run\(s\) .*base-seed0 \(training.steps: 6 -> 8.*--rerun"):
        Study(config(source, steps=8), tmp_path)
    pool.ran = []
    study = Study(config(source, steps=8), tmp_path, rerun=True)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        study.results()
    study.train(jobs=1)
    assert len(pool.ran) == 6 and not (tmp_path / "runs" / "base-seed0" / "left").exists()


def test_a_comparison_can_be_moved(source: Path, tmp_path: Path, pool: Pool) -> None:
    Study(config(source), tmp_path / "a").train(jobs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    pool.ran = []
    Study(config(source), tmp_path / "b").train(jobs=1)
    assert pool.ran == []


def test_wandb_gets_the_runs_as_one_group(source: Path, tmp_path: Path) -> None:
    made = config(source)
    made.run["tracking"] = {"wandb": "offline"}
    study = Study(made, tmp_path)
    tracking = [run.config.tracking for runs in study.plans.values() for run in runs]
    assert {one.group for one in tracking} == {"mine"} and len({one.name for one in tracking}) == len(tracking)


def test_the_report_is_whole_without_matplotlib_too(
    source: Path, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(source)
    study = Study(made, tmp_path)
    study.train(jobs=1)
    comparison = study.results()
    save_results(comparison, made, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][1]["loss"] == 1.5
    pytest.importorskip("matplotlib")
    write_report(comparison, made, tmp_path)
    assert (tmp_path / "losses-steps.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png" in page and "http" not in page.split("<style>")[1]

    def missing(comparison: object) -> dict[str, bytes]:
        raise ImportError("charts need matplotlib: pip install 'dalle-torch[eval]'")

    monkeypatch.setattr("dalle_torch.studies.compare_report.charts", missing)
    write_report(comparison, made, tmp_path)
    assert "rates" in (tmp_path / "report.html").read_text()
    assert "pip install 'dalle-torch[eval]'" in caplog.text
