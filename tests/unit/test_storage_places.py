"""Small files here and behind a URL: the same answers from both."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dalle_torch.storage import Place


@pytest.fixture(params=["path", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    name = f"places-{secrets.token_hex(4)}"
    yield Place({"path": str(tmp_path / name), "file": f"file://{tmp_path}/{name}", "memory": f"memory://{name}"}[
        request.param
    ])  # fmt: skip
    fsspec.filesystem("memory").store.clear()


def test_files_are_written_listed_moved_and_removed(place: Place) -> None:
    assert place.names() == []
    place.write("b.json", b"two")
    place.write("a.json", b"one")
    place.write(".hidden", b"")
    (place / "below").write("c.json", b"three")
    assert place.names() == ["a.json", "b.json"]
    assert place.read("a.json") == b"one" and place.read("a.json", 2) == b"on"
    place.write("a.json", b"new")
    place.move("a.json", "below/d.json")
    assert place.names() == ["b.json"] and (place / "below").names() == ["c.json", "d.json"]
    assert place.read("below/d.json") == b"new"
    place.remove("b.json")
    place.remove("b.json")
    assert place.names() == []
    with pytest.raises(FileNotFoundError):
        place.read("b.json")


def test_what_cannot_be_reached_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="nosuch://x cannot be reached") as caught:
        Place("nosuch://x")
    assert "\n" not in str(caught.value)


def test_failures_of_a_file_system_are_os_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("memory://failing")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("token\nexpired")

    monkeypatch.setattr(type(place._system), "pipe_file", fail)
    with pytest.raises(OSError, match="memory://failing: RuntimeError: token expired"):
        place.write("x", b"")
