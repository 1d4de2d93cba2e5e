"""One process saves and loads: exactly, on a disk and behind a URL, asynchronously, keeping what is to be kept."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_torch
from dalle_torch.checkpoint import Checkpoint, CheckpointFolder
from dalle_torch.checkpoint.index import Stack
from dalle_torch.checkpoint.store import Store
from dalle_torch.checkpoint.writing import Save
from dalle_torch.storage import CheckpointError
from tests.unit.checkpoint.states import equal, state

ROOT = Path(dalle_torch.__file__).parent.parent


@pytest.fixture(params=["disk", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A local folder, and one of fsspec that knows no renaming, as object stores do not."""
    if request.param == "disk":
        yield str(tmp_path / "run" / "checkpoints")
        return
    import fsspec

    yield "memory://run/checkpoints"
    fsspec.filesystem("memory").rm("/run", recursive=True)


def names(url: str) -> list[str]:
    return Store(url).folders()


def test_what_is_saved_comes_back_bit_by_bit(url: str) -> None:
    folder = CheckpointFolder(url)
    assert folder.newest() is None
    assert folder.steps() == []
    folder.save(1000, state(3), {"step": 1000, "config": {"a": [1, None]}}, {"data": "x"})
    checkpoint = CheckpointFolder(url).newest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.url) == (1000, f"{Store(url).url}/step-00001000")
    assert checkpoint.meta == {"step": 1000, "config": {"a": [1, None]}}
    assert checkpoint.host_metas == [{"data": "x"}]
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in state(3).items()}
    assert checkpoint.dtypes == {name: tensor.dtype for name, tensor in state(3).items()}
    assert equal(checkpoint.read(), state(3))
    assert equal(checkpoint.read(["model/half"]), {"model/half": state(3)["model/half"]})
    into = state(4)
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    checkpoint.load(into)
    assert equal(into, state(3))
    assert places == {name: tensor.data_ptr() for name, tensor in into.items()}
    assert not into["model/transposed"].is_contiguous()


def test_torchs_own_tools_read_it_too(tmp_path: Path) -> None:
    CheckpointFolder(str(tmp_path)).save(1, state(3), {})
    into = {name: torch.zeros_like(tensor) for name, tensor in state(3).items()}
    dcp.load(into, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    assert equal(into, state(3))


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    order=st.randoms(),
)
def test_any_shape_and_layout(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, order: Any
) -> None:
    tensor = torch.randint(0, 200, shape).to(dtype).permute(order.sample(range(len(shape)), len(shape)))
    folder = CheckpointFolder(str(tmp_path_factory.mktemp("any")))
    folder.save(1, {"a": tensor, "b": tensor[:1] if shape else tensor}, {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), {"a": tensor, "b": tensor[:1] if shape else tensor})


def test_what_does_not_fit_is_named_and_nothing_changed(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    folder.save(1, state(1), {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    into = state(2)
    into["model/new"] = torch.zeros(2)
    del into["model/part"]
    into["model/weight"] = torch.zeros(5, 7)
    into["model/half"] = torch.zeros(9)
    before = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(CheckpointError) as found:
        checkpoint.load(into)
    for words in (
        "model/new is missing in it", "model/part is unknown here", "model/half is bfloat16, expected float32",
        "model/weight has shape [7, 5], expected [5, 7]", "step-00000001 does not fit",
    ):  # fmt: skip
        assert words in str(found.value)
    assert equal(before, into)
    with pytest.raises(CheckpointError, match="does not have model/x, y"):
        checkpoint.read(["model/half", "model/x", "y"])


def test_tensors_that_lie_together_are_filled_in_place(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    saved = {name: torch.randn(4, 3) for name in ("a", "b", "c")} | {name: torch.randn(2) for name in ("d", "e")}
    folder.save(1, saved, {})
    checkpoint = folder.newest()
    assert checkpoint is not None
    rows, bare, one = torch.full((10, 3), 7.0), torch.zeros(2, 2), {"c": torch.zeros(4, 3)}
    stacks = [Stack(rows, ["b", "a"], 4), Stack(bare, ["d", "e"], 0)]
    checkpoint.load(one, stacks)
    assert torch.equal(rows, torch.cat([saved["b"], saved["a"], torch.full((2, 3), 7.0)]))
    assert torch.equal(bare, torch.stack([saved["d"], saved["e"]]))
    assert torch.equal(one["c"], saved["c"])
    with pytest.raises(CheckpointError, match=r"b has shape \[4, 3\], expected \[5, 3\]"):
        checkpoint.load(one, [Stack(rows, ["b", "a"], 5), stacks[1]])


def test_what_stays(url: str) -> None:
    folder = CheckpointFolder(url, keep=2, keep_every=4)
    for step in range(1, 11):
        folder.save(step, state(step), {})
        assert folder.steps() == [s for s in range(1, step + 1) if s > step - 2 or s % 4 == 0]
    assert names(url) == [f"step-{step:08d}" for step in folder.steps()]
    with pytest.raises(ValueError, match="keep=0 and keep_every=None must be at least 1"):
        CheckpointFolder(url, keep=0)


def test_the_same_step_again(url: str) -> None:
    folder = CheckpointFolder(url, keep=2)
    for content in range(3):
        folder.save(5, state(content), {"content": content})
        checkpoint = folder.newest()
        assert checkpoint is not None
        assert checkpoint.meta == {"content": content}
        assert equal(checkpoint.read(), state(content))
        assert len(names(url)) == 1
    folder.save(6, state(6), {})
    assert folder.steps() == [5, 6]


def test_the_old_one_of_a_step_stays_until_the_new_one_is_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(url, keep=1)
    folder.save(5, state(1), {})

    def fail(self: Save, count: int) -> None:
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the line is dead"):
        patch.setattr(Save, "commit", fail)
        folder.save(5, state(2), {})
    assert names(url) == ["step-00000005"]
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), state(1))


class Stopped(BaseException):
    """As if the power were off: nothing is tidied up after it."""


@pytest.mark.parametrize("writes", range(5))
def test_stopped_before_any_of_its_writes(url: str, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done = CheckpointFolder(url, keep=1), 0
    folder.save(1, state(1), {})

    def limited(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Store, *args: Any) -> Any:
            nonlocal done
            done += 1
            if done > writes:
                raise Stopped
            return method(self, *args)

        return call

    with monkeypatch.context() as patch:
        for name in ("writer", "write", "remove"):
            patch.setattr(Store, name, limited(getattr(Store, name)))
        with pytest.raises(Stopped):
            folder.save(1, state(2), {})
    # An object store has no folders before there is a file in them.
    assert len(names(url)) == (1 if url.startswith("memory") and not writes else 2)
    checkpoint = CheckpointFolder(url).newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), state(1))
    folder.save(2, state(2), {})
    assert names(url) == ["step-00000002"]


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gate, write = CheckpointFolder(url), threading.Event(), Save.write

    def slow(self: Save) -> None:
        assert gate.wait(60)
        write(self)

    monkeypatch.setattr(Save, "write", slow)
    tensors = state(1)
    folder.save(1, tensors, {}, asynchronous=True)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert folder.steps() == []
    gate.set()
    folder.save(2, tensors, {}, asynchronous=True)  # waits for the first
    assert folder.steps()[0] == 1
    folder.wait()
    folder.wait()
    second = folder.newest()
    assert second is not None
    assert equal(second.read(), tensors)
    assert equal(Checkpoint(Store(url), "step-00000001").read(), state(1))


def test_an_error_of_an_asynchronous_save_is_raised_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(url)
    folder.save(1, state(1), {})

    def fail(self: Save) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Save, "write", fail)
        folder.save(2, state(2), {}, asynchronous=True)
        with pytest.raises(OSError, match=r"step 2 could not be written \(No space left on device\)"):
            folder.wait()
        folder.wait()
        folder.save(2, state(2), {}, asynchronous=True)
        with pytest.raises(OSError, match="step 2 could not be written"):
            folder.save(3, state(3), {})
    assert names(url) == ["step-00000001"]
    folder.save(3, state(3), {})
    assert folder.steps() == [1, 3]


@pytest.mark.parametrize("ending", ["", "raise KeyboardInterrupt"])
def test_a_process_that_ends_finishes_its_asynchronous_save(tmp_path: Path, ending: str) -> None:
    code = (
        "import sys, time\nfrom dalle_torch.checkpoint import CheckpointFolder\n"
        "from dalle_torch.checkpoint.writing import Save\nfrom tests.unit.checkpoint.states import state\n"
        "write = Save.write\n"
        "def slow(self):\n    time.sleep(0.5)\n    write(self)\n"
        "Save.write = slow\n"
        f"CheckpointFolder(sys.argv[1]).save(7, state(7), {{}}, asynchronous=True)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == (ending == ""), done.stderr
    checkpoint = CheckpointFolder(str(tmp_path)).newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), state(7))


def test_leftovers_are_told_of_and_removed_and_what_is_not_ours_stays(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, store = CheckpointFolder(url), Store(url)
    folder.save(1, state(1), {})
    for name in ("step-00000002", ".saving-step-00000003-0123abcd"):
        store.make(name)
        store.write(name, "__0_0.distcp", b"half")
    store.make("step-00000004")
    store.write("step-00000004", "work-of-years.txt", b"mine")
    store.make("notes")
    store.write("notes", "__0_0.distcp", b"mine")
    with caplog.at_level(logging.WARNING, "dalle_torch"):
        checkpoint = folder.newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is skipped: ")[0].split()[-1] for line in lines] == [
        "step-00000004", ".saving-step-00000003-0123abcd", "step-00000002",
    ]  # fmt: skip
    assert all("was never finished" in line for line in lines)
    folder.save(4, state(4), {})
    assert names(url) == ["notes", "step-00000001", "step-00000004", "step-00000004-1"]
    assert folder.steps() == [1, 4]
    assert store.read("step-00000004", "work-of-years.txt") == b"mine"


def test_damaged_ones_count_for_nothing_among_those_that_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=2)
    for step in (1, 2, 9):
        CheckpointFolder(str(tmp_path), keep=9).save(step, state(step), {})
    for step in (2, 9):
        (tmp_path / f"step-0000000{step}" / "__0_0.distcp").unlink()
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    folder.save(3, state(3), {})
    assert folder.steps() == [1, 3, 9]
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert checkpoint.step == 3


LIMITED = """
import os, resource, sys
from dalle_torch.checkpoint import CheckpointFolder
from tests.unit.checkpoint.states import equal, state
folder = CheckpointFolder(sys.argv[1])
folder.save(1, state(1), {})
if os.getuid() == 0:
    os.chmod(sys.argv[1], 0o555)
    os.setuid(65534)
else:
    os.chmod(sys.argv[1], 0o555)
try:
    folder.save(2, state(2), {})
except OSError as error:
    print(error)
print(folder.steps(), equal(folder.newest().read(), state(1)))
"""


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix="dalle_torch_"))  # pytest's own folders are closed to other users
    try:
        place.chmod(0o755)
        words = [sys.executable, "-c", LIMITED, str(place / "run")]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        message, rest = done.stdout.splitlines()
        assert f"{place / 'run'}: the checkpoint of step 2 could not be written (Permission denied)" in message
        assert "set checkpoint.folder to another place" in message
        assert rest == "[1] True"
        (place / "run").chmod(0o755)
        assert names(str(place / "run")) == ["step-00000001"]
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(tmp_path: Path, asynchronous: bool) -> None:
    code = (
        "import resource, sys\nfrom dalle_torch.checkpoint import CheckpointFolder\n"
        "from tests.unit.checkpoint.states import state\n"
        "folder = CheckpointFolder(sys.argv[1])\nfolder.save(1, state(1), {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"try:\n    folder.save(2, state(2, big=100_000), {{}}, asynchronous={asynchronous})\n    folder.wait()\n"
        "except OSError as error:\n    print(error)\n"
        "print(folder.steps())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, steps = done.stdout.splitlines()
    assert f"{tmp_path}: the checkpoint of step 2 could not be written (File too large)" in message
    assert steps == "[1]"
    assert names(str(tmp_path)) == ["step-00000001"]
    assert ("was not written" in done.stderr) == asynchronous
    checkpoint = CheckpointFolder(str(tmp_path)).newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), state(1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_no_space_left_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint import filesystem

    folder = CheckpointFolder(str(tmp_path))
    folder.save(1, state(1), {})
    with monkeypatch.context() as patch:
        concat = filesystem.FileSystem.concat_path
        patch.setattr(
            filesystem.FileSystem,
            "concat_path",
            lambda self, path, name: Path("/dev/full") if name.endswith(".distcp") else concat(self, path, name),
        )
        with pytest.raises(OSError, match=r"step 2 could not be written \(No space left on device\)"):
            folder.save(2, state(2, big=100_000), {})
    assert names(str(tmp_path)) == ["step-00000001"]


def test_a_folder_that_has_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "disk"))
    folder.save(1, state(1), {})
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="step 2 could not be written .*the folder was there, and has gone"):
        folder.save(2, state(2), {})
    assert not (tmp_path / "disk").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    folder.save(2, state(2), {})
    assert folder.steps() == [1, 2]


def test_a_folder_that_goes_while_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, commit = CheckpointFolder(str(tmp_path / "disk")), Save.commit

    def unplug(self: Save, count: int) -> None:
        (tmp_path / "disk").rename(tmp_path / "elsewhere")
        commit(self, count)

    monkeypatch.setattr(Save, "commit", unplug)
    with pytest.raises(OSError, match="step 1 could not be written"):
        folder.save(1, state(1), {})
    assert not (tmp_path / "disk").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    with pytest.raises(ValueError, match="these are none: a"):
        folder.save(1, {"a": 3}, {})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="meta of a checkpoint has to be JSON"):
        folder.save(1, state(1), {"a": object()})
    with pytest.raises(ValueError, match="host_index=2 must lie in"):
        CheckpointFolder(str(tmp_path), host_index=2)
    with pytest.raises(ValueError, match="checkpoint folder strange://x: "):
        CheckpointFolder("strange://x")
    assert names(str(tmp_path)) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        CheckpointFolder(str(tmp_path / "file")).save(1, state(1), {})


def test_the_folder_holds_json_and_torchs_files(tmp_path: Path) -> None:
    CheckpointFolder(str(tmp_path)).save(1, state(1), {"a": 1})
    place = tmp_path / "step-00000001"
    assert {path.name for path in place.iterdir()} == {
        "committed.json", "meta.json", "host-00000.json", ".metadata", "__0_0.distcp",
    }  # fmt: skip
    marker = json.loads((place / "committed.json").read_text())
    assert marker["step"] == 1
    assert marker["files"]["__0_0.distcp"] == {"size": (place / "__0_0.distcp").stat().st_size}
    assert str(tmp_path).encode() not in (place / ".metadata").read_bytes()
