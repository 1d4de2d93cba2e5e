"""Who speaks, how loud, and when a progress bar shows."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dalle_torch import log


@contextmanager
def alone() -> Iterator[io.StringIO]:
    """A fresh package logger in an application without handlers of its own; yields its stderr."""
    # A context rather than a fixture: pytest installs its own handlers and streams between set-up and test.
    root, package = logging.getLogger(), logging.getLogger("dalle_torch")
    handlers, own, level = root.handlers[:], package.handlers[:], package.level
    root.handlers.clear()
    package.handlers.clear()
    stderr = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            yield stderr
    finally:
        root.handlers[:], package.handlers[:] = handlers, own
        package.setLevel(level)
        log.set_rank(None)


def test_messages_go_to_stderr_once() -> None:
    with alone() as stderr:
        for _ in range(3):
            logger = log.get_logger("dalle_torch.models.loading")
        logger.info("read %d tensors", 7)
        logger.debug("too fine")
        assert stderr.getvalue() == "I dalle_torch: read 7 tensors\n"


def test_names_end_up_below_the_package() -> None:
    assert log.get_logger("launch.pod").name == "dalle_torch.launch.pod"
    assert log.get_logger("dalle_torch.x").name == "dalle_torch.x"
    assert log.get_logger().name == "dalle_torch"


def test_other_ranks_only_warn_and_say_who_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone() as stderr:
        logger = log.get_logger()
        monkeypatch.setenv("RANK", "3")
        logger.info("everybody is here")
        logger.warning("disk is full")
        assert stderr.getvalue() == "W dalle_torch [rank 3]: disk is full\n"
        log.set_rank(0)
        logger.info("set_rank goes before the launcher")
        assert stderr.getvalue().endswith("I dalle_torch: set_rank goes before the launcher\n")


def test_an_application_with_handlers_gets_the_records_instead() -> None:
    with alone() as stderr:
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        log.get_logger().warning("once")
        assert records == ["once"]
        assert stderr.getvalue() == ""


def test_the_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone() as stderr:
        monkeypatch.setenv("DALLE_TORCH_LOG", "error")
        log.get_logger().warning("not shown")
        assert stderr.getvalue() == ""


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone():
        monkeypatch.setenv("DALLE_TORCH_LOG", "loud")
        with pytest.raises(ValueError, match="DALLE_TORCH_LOG='loud' is not one of debug, info, warning, error"):
            log.get_logger()


def test_progress_is_silent_without_a_terminal_and_shows_when_forced() -> None:
    with alone() as stderr:
        assert list(log.progress(range(3), desc="steps")) == [0, 1, 2]
        assert stderr.getvalue() == ""
        with log.progress(total=3, desc="steps", unit="step", force=True) as bar:
            bar.update(2)
            bar.refresh()
        assert "steps" in stderr.getvalue()
        assert "2/3" in stderr.getvalue()


def test_progress_shows_on_the_first_rank_only() -> None:
    with alone() as stderr:
        log.set_rank(1)
        assert list(log.progress(range(3), force=True)) == [0, 1, 2]
        assert stderr.getvalue() == ""
