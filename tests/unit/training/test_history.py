"""The list of changes: its file, its merge with a checkpoint's, and which wish counts."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dalle_torch.training.control import Change, History, read_history
from tests.unit.training.run_configs import run_config

LR = Change("optimizer.lr", 1e-4, 5e-5, 10, "2026-01-01T10:00:00+00:00", "a", "me@here")


def test_the_file_and_a_checkpoints_list_become_one(tmp_path: Path) -> None:
    path = tmp_path / "run" / "history.jsonl"
    file = History(path)
    file.record([LR])
    file.record([LR])
    later = replace(LR, new=1e-5, step=20, time="2026-01-01T11:00:00+00:00", id="b")
    merged = History(path, [LR.to_json(), later.to_json()])
    assert list(merged) == [LR, later] == list(History(path))
    assert path.read_bytes() == merged.dump()
    assert read_history(path.read_bytes(), "x") == [LR, later]
    assert list(History(saved=merged.to_list())) == [LR, later]


def test_a_torn_or_foreign_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "history.jsonl"
    History(path).record([LR])
    with path.open("a") as file:
        file.write('{"name": "training.steps", "old": 1, "new": 2}\n[]\n{"name": "optimizer.lr", "ol')
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        history = History(path)
    assert list(history) == [LR] and "is no change" in caplog.text
    history.record([replace(LR, step=11, id="b")])
    assert len(History(path)) == 2


def test_a_checkpoints_list_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="step is missing"):
        History(saved=[replace(LR, step=None).to_json()])
    with pytest.raises(ValueError, match="optimizer.lr=x"):
        History(saved=[LR.to_json() | {"new": "x"}])
    with pytest.raises(ValueError, match="recorded with the step"):
        History().record([replace(LR, step=None)])


def test_a_newer_wish_at_an_earlier_step_outweighs_what_was_wanted_before() -> None:
    """At step 10 the run had 5e-5; it was killed, and at step 8 of the second try the user asked for 2e-5."""
    newer = replace(LR, new=2e-5, step=8, time="2026-01-02T10:00:00+00:00", id="b")
    other = replace(LR, name="training.log_every", old=50, new=7)
    history = History(saved=[change.to_json() for change in (LR, newer, other)])
    assert history.at(8) == [newer] and history.at(10) == [other]
    assert history.config_at(run_config(), 8).optimizer.lr == 1e-4
    assert history.config_at(run_config(), 9).optimizer.lr == 2e-5
    assert history.config_at(run_config()).optimizer.lr == 2e-5
    assert history.has("b") and not history.has("c") and history.of("a") == [LR, other]


def test_a_history_of_another_configuration_is_told() -> None:
    history = History(saved=[replace(LR, name="optimizer.beta1", old=None, new=0.5).to_json()])
    with pytest.raises(ValueError, match="changes made to this run .optimizer.beta1. do not fit its configuration: .*"):
        history.config_at(run_config("adafactor"))
