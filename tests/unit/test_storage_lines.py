"""Lines that are whole or absent, wherever a process was killed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.storage.lines import LinesFile, line_of, parse_lines, repair, set_aside


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.text(max_size=20), max_size=5), cut=st.integers(0, 200))
def test_what_is_left_of_a_killed_process_is_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], cut: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    file = LinesFile(path)
    for row in rows:
        file.append({"text": row})
    file.close()
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    again = LinesFile(path)
    again.append({"text": "next"})
    again.close()
    whole = data.count(b"\n")
    found = parse_lines(path.read_text(encoding="utf-8"))
    assert [row["text"] for row in found] == [*rows[:whole], "next"]


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    repair(path)
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"x" * 200_000)
    repair(path)
    assert path.read_bytes() == b""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    class FullAfter:
        """A file on a disk that has room for 30 bytes more."""

        def __init__(self, file) -> None:  # type: ignore[no-untyped-def]
            self.file, self.room = file, 30

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    lines = LinesFile(tmp_path / "file")
    lines._file = FullAfter(lines._file)  # type: ignore[assignment]
    lines.append({"a": 1})
    with pytest.raises(OSError, match="No space"):
        lines.append({"b": 2}, {"long": "x" * 50})
    assert (tmp_path / "file").read_text() == '{"a": 1}\n'


def test_numbers_without_json_are_null_and_named() -> None:
    line = line_of({"loss": float("nan"), "low": float("-inf"), "lr": 0.5, "deep": {"norm": float("inf"), "n": [1.5]}})
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "loss": None, "low": None, "lr": 0.5, "deep": {"norm": None, "n": [1.5]},
        "nonfinite": {"loss": "nan", "low": "-inf"},
    }  # fmt: skip


def test_lines_set_aside_are_neither_lost_nor_doubled_by_a_kill_in_between(tmp_path: Path) -> None:
    path, aside = tmp_path / "file", tmp_path / "aside"
    path.write_bytes(b"a\nb\nc\n")
    # The state after a kill between the two writes.
    aside.write_bytes(b"old\nb\nc\n")
    set_aside(path, aside, [b"b\n", b"c\n"], [b"a\n"])
    assert (path.read_bytes(), aside.read_bytes()) == (b"a\n", b"old\nb\nc\n")
    set_aside(path, aside, [b"a\n"], [])
    assert (path.read_bytes(), aside.read_bytes()) == (b"", b"old\nb\nc\na\n")
