"""What is cut, changed or made up is never taken for a checkpoint, and runs no code."""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.checkpoint.index import Entry, Part
from dalle_torch.checkpoint.store import Store
from dalle_torch.storage import CheckpointError
from tests.unit.checkpoint.states import equal, state


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The newer one of two checkpoints."""
    folder = CheckpointFolder(str(tmp_path))
    folder.save(1, state(1), {"a": 1})
    folder.save(2, state(2), {"a": 2})
    return tmp_path / "step-00000002"


def sealed(place: Path) -> None:
    """The marker made to fit what lies there, as someone would who wants it to be believed."""
    marker = json.loads((place / "committed.json").read_text())
    for name, entry in marker["files"].items():
        content = (place / name).read_bytes()
        entry["size"] = len(content)
        if "sha256" in entry:
            entry["sha256"] = hashlib.sha256(content).hexdigest()
    (place / "committed.json").write_text(json.dumps(marker))


def change(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        value = json.loads((place / name).read_text())
        edit(value)
        (place / name).write_text(json.dumps(value))

    return apply


def cut(name: str) -> Callable[[Path], None]:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size - 1)


def flipped(name: str) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 1
        (place / name).write_bytes(content)

    return apply


def host(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        change("host-00000.json", edit)(place)
        sealed(place)

    return apply


def unlinked(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unlinked("committed.json"), "was never finished"),
        (unlinked("__0_0.distcp"), "__0_0.distcp is missing"),
        (unlinked("meta.json"), "meta.json is missing"),
        (unlinked("host-00000.json"), "host-00000.json is missing"),
        (cut("__0_0.distcp"), r"__0_0.distcp has \d+ bytes, not \d+"),
        (cut("meta.json"), "is not whole"),
        (cut("committed.json"), "is not JSON"),
        (flipped("meta.json"), "meta.json is not what was written"),
        (flipped("host-00000.json"), "host-00000.json is not what was written"),
        (flipped(".metadata"), ".metadata is not what was written"),
        (change("committed.json", lambda marker: marker.update(format=2)), "has format 2, and this version"),
        (change("committed.json", lambda marker: marker.update(step=7)), "says that it is of step 7"),
        (change("committed.json", lambda marker: marker.update(files=3)), "malformed"),
        (change("committed.json", lambda marker: marker.pop("hosts")), "'hosts'"),
        (lambda place: (place / "committed.json").write_text("[]"), "no JSON object"),
        (lambda place: (place / "committed.json").write_text("[" * 100_000), "is not JSON"),
        (host(lambda value: value["parts"].pop()), "do not make up its shape"),
        (host(lambda value: value["parts"].append(value["parts"][0])), "do not make up its shape"),
        (host(lambda value: value["parts"][0].__setitem__(3, "../../etc/passwd")), "no file of a checkpoint"),
        (host(lambda value: value["parts"][0].__setitem__(4, 10**9)), "ends before"),
        (host(lambda value: value["parts"][0].__setitem__(4, -1)), "malformed"),
        (host(lambda value: value["tensors"].popitem()), "malformed"),
        (host(lambda value: value["tensors"].update(x=["float32", [1]])), "11 tensors, and 10 were saved"),
        (host(lambda value: value["tensors"]["model/weight"].__setitem__(0, "nn")), "malformed"),
    ],
)  # fmt: skip
def test_damage_is_found_and_the_older_one_taken(
    place: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], message: str
) -> None:
    damage(place)
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        checkpoint = CheckpointFolder(str(place.parent)).newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert equal(checkpoint.read(), state(1))
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("the checkpoint step-00000002 is skipped: ")
    assert re.search(message, line)
    assert "\n" not in line


def test_a_bit_that_flips_in_the_numbers_is_found_when_they_are_read(place: Path) -> None:
    checkpoint = CheckpointFolder(str(place.parent)).newest()
    assert checkpoint is not None
    host_file = json.loads((place / "host-00000.json").read_text())
    (start, length) = next(part[4:] for part in host_file["parts"] if part[0] == "model/weight")
    content = bytearray((place / "__0_0.distcp").read_bytes())
    found = content.index(state(2)["model/weight"].numpy().tobytes(), start, start + length)
    content[found + 50] ^= 4
    (place / "__0_0.distcp").write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000002/__0_0.distcp: model/weight is damaged: Bad CRC-32"):
        checkpoint.read()
    assert equal(checkpoint.read(["model/half"]), {"model/half": state(2)["model/half"]})


class Evil:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_doctored_folder_runs_no_code(place: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (place / ".metadata").write_bytes(pickle.dumps(Evil(trap)))
    # Each tensor's archive with a pickle that runs code in it, which torch.load would refuse, or run.
    content, parts = b"", []
    host_file = json.loads((place / "host-00000.json").read_text())
    for name, offsets, sizes, file, _, _ in host_file["parts"]:
        part = archive(state(2)[name], pickle.dumps(Evil(trap)))
        parts.append([name, offsets, sizes, file, len(content), len(part)])
        content += part
    (place / "__0_0.distcp").write_bytes(content)
    (place / "host-00000.json").write_text(json.dumps(host_file | {"parts": parts}))
    sealed(place)
    checkpoint = CheckpointFolder(str(place.parent)).newest()
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert equal(checkpoint.read(), state(2))
    into = {name: torch.zeros_like(tensor) for name, tensor in state(2).items()}
    checkpoint.load(into)
    assert not trap.exists()
    pickle.loads((place / ".metadata").read_bytes())
    assert trap.exists()  # it would have gone off


def archive(tensor: torch.Tensor, pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive at all", "is damaged: File is not a zip file"),
        (b"", "is damaged"),
        ("short", "has 4 bytes where 140 are due"),
        ("long", "has 800 bytes where 140 are due"),
    ],
)
def test_an_archive_that_is_none(place: Path, content: Any, message: str) -> None:
    host_file = json.loads((place / "host-00000.json").read_text())
    wrong = {"short": torch.zeros(1), "long": torch.zeros(200)}
    new = archive(wrong[content], b"") if isinstance(content, str) else content
    file = place / "__0_0.distcp"
    (part,) = [part for part in host_file["parts"] if part[0] == "model/weight"]
    part[4:] = [file.stat().st_size, len(new)]
    file.write_bytes(file.read_bytes() + new)
    (place / "host-00000.json").write_text(json.dumps(host_file))
    sealed(place)
    checkpoint = CheckpointFolder(str(place.parent)).newest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read()


def test_a_folder_that_cannot_be_read_is_no_reason_to_take_an_older_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Store, folder: str, name: str, *at: object) -> bytes:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(Store, "read", fail)
    with pytest.raises(ConnectionError, match="the line is dead"):
        CheckpointFolder(str(place.parent)).newest()


def test_nothing_whole_is_nothing(place: Path) -> None:
    shutil.rmtree(place.parent / "step-00000001")
    (place / "meta.json").unlink()
    assert CheckpointFolder(str(place.parent)).newest() is None


@pytest.mark.parametrize(
    ("shape", "blocks", "covered"),
    [
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 4))], True),
        ((4, 4), [((0, 0), (2, 2)), ((0, 2), (4, 2)), ((2, 0), (2, 2))], True),
        ((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))], False),
        ((4, 4), [((0, 0), (4, 4)), ((3, 3), (1, 1))], False),
        ((4, 4), [((0, 0), (2, 4)), ((0, 0), (2, 4))], False),
        ((4, 4), [((0, 0), (2, 4)), ((4, 0), (2, 4))], False),
        ((4, 4), [((0,), (16,))], False),
        ((), [((), ())], True),
        ((), [((), ()), ((), ())], False),
        ((), [], False),
        ((0, 3), [((0, 0), (0, 3))], True),
        ((0, 3), [], False),
    ],
)
def test_blocks_that_make_up_a_tensor(shape: Any, blocks: Any, covered: bool) -> None:
    parts = [Part(offsets, sizes, "f", 0, 0) for offsets, sizes in blocks]
    assert Entry(torch.float32, shape, parts).covered() == covered
