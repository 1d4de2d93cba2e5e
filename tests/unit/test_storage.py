"""Local sources, and files and folders that are whole or absent."""

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.storage import WEIGHT_FORMATS, atomic_file, atomic_folder, choose_weights, resolve, sha256_of
from dalle_torch.storage.choice import matching
from dalle_torch.storage.sources import _inside


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestLocal:
    def test_a_folder_is_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model" / "vqgan").mkdir(parents=True)
        assert resolve(tmp_path / "model") == tmp_path / "model"
        assert resolve(str(tmp_path / "model"), subfolder="vqgan") == tmp_path / "model" / "vqgan"
        monkeypatch.chdir(tmp_path)
        assert resolve("model") == Path("model"), "a folder goes before a hub id"
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/model") == tmp_path / "model"

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ("", ValueError, "the source is empty"),
            ("a/b/c", FileNotFoundError, "a/b/c is not a folder here, and no hub id either"),
            ("/no/such/folder", FileNotFoundError, "/no/such/folder is not a folder here"),
            (Path("org/model"), FileNotFoundError, "org/model is not a folder here"),
            ("project/name:v1", ValueError, "'project/name:v1' is neither a folder nor a wandb artifact, which is"),
            ("../../name:v1", ValueError, "neither a folder nor a wandb artifact"),
            ("odd://bucket/x", ValueError, "odd://bucket/x has a scheme that fsspec does not know"),
        ],
    )
    def test_what_leads_nowhere(self, source: str | Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            resolve(source)
        assert "\n" not in str(caught.value)

    def test_a_file_is_no_source(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file: give the folder that holds it"):
            resolve(tmp_path / "model.safetensors")

    def test_a_missing_subfolder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="has no folder 'vqgan'"):
            resolve(tmp_path, subfolder="vqgan")

    @given(st.lists(st.sampled_from(["..", ".", "a", "", "/", "\\", "c d"])).map("/".join))
    def test_a_subfolder_stays_inside(self, subfolder: str) -> None:
        try:
            inside = _inside(subfolder)
        except ValueError as error:
            assert "leads out of the source" in str(error)
            assert ".." in subfolder or subfolder.startswith(("/", "\\"))
        else:
            assert os.path.normpath(Path("/root") / inside).startswith("/root")


NAMES = st.sampled_from(
    ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "flax_model.msgpack",
     "last.ckpt", "model.yaml", "encoder.pt", "decoder_mini.pt", "config.json", "vqgan/model.safetensors", "x.bin"]
)  # fmt: skip


@given(st.sets(NAMES))
def test_the_first_format_present_is_chosen(names: set[str]) -> None:
    present = [patterns for patterns in WEIGHT_FORMATS if matching(names, patterns)]
    if present:
        assert choose_weights(names) == present[0]
    else:
        with pytest.raises(FileNotFoundError, match="the folder has no weights that can be read here"):
            choose_weights(names)


class TestAtomicFile:
    def test_is_written_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "weights.npz"
        with atomic_file(target) as path:
            path.write_bytes(b"half")
            assert not target.exists()
            assert path.parent == target.parent, "a rename must not cross file systems"
            assert path.suffix == ".npz"
        assert target.read_bytes() == b"half"
        assert listing(tmp_path / "new") == ["weights.npz"]

    def test_has_the_usual_permissions(self, tmp_path: Path) -> None:
        with atomic_file(tmp_path / "a") as path:
            path.touch()
        (tmp_path / "b").touch()
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
    def test_leaves_the_old_file_when_interrupted(self, tmp_path: Path, error: type[BaseException]) -> None:
        target = tmp_path / "file"
        target.write_text("old")
        with pytest.raises(error), atomic_file(target) as path:
            path.write_text("ne")
            raise error
        assert target.read_text() == "old"
        assert listing(tmp_path) == ["file"]

    def test_follows_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        with atomic_file(tmp_path / "link") as path:
            path.write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="is a folder"), atomic_file(tmp_path):
            pass

    def test_a_block_that_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
            pass
        assert listing(tmp_path) == []


class TestAtomicFolder:
    def test_replaces_the_whole_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "checkpoint"
        for content in ("one", "two"):
            with atomic_folder(target) as folder:
                (folder / "sub").mkdir()
                (folder / "sub" / content).write_text(content)
        assert listing(tmp_path) == ["checkpoint", "checkpoint/sub", "checkpoint/sub/two"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    @pytest.mark.parametrize("existing", [True, False])
    def test_leaves_what_was_there_when_interrupted(
        self, tmp_path: Path, error: type[BaseException], existing: bool
    ) -> None:
        target = tmp_path / "checkpoint"
        if existing:
            target.mkdir()
            (target / "old").touch()
        with pytest.raises(error), atomic_folder(target) as folder:
            (folder / "new").touch()
            raise error
        assert listing(tmp_path) == (["checkpoint", "checkpoint/old"] if existing else [])

    @pytest.mark.parametrize("step", [1, 2])
    def test_an_interruption_between_the_renames(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        """Ctrl-C right before the old folder goes, and right before the new one comes."""
        target = tmp_path / "checkpoint"
        target.mkdir()
        (target / "old").touch()
        rename, calls = Path.rename, []

        def interrupted(self: Path, to: Path) -> Path:
            calls.append(self)
            if len(calls) == step:
                raise KeyboardInterrupt
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
            (folder / "new").touch()
        assert listing(tmp_path) == ["checkpoint", "checkpoint/old"]

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(tmp_path / "file"):
            pass

    def test_does_not_replace_where_one_stands(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        for place in (".", tmp_path, Path.home(), "/"):
            with pytest.raises(ValueError, match="holds the current or the home folder"), atomic_folder(place):
                pass
        assert listing(tmp_path) == ["here"]


@given(st.binary(max_size=2000))
def test_sha256(content: bytes) -> None:
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert sha256_of(file.name) == hashlib.sha256(content).hexdigest()


def test_patterns_cover_names_as_the_hub_does() -> None:
    names = ["config.json", "vqgan/config.json", "Config.JSON"]
    assert matching(names, ["*.json"]) == ["config.json", "vqgan/config.json"]
    assert matching(names, None) == names
