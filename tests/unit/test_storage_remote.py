"""Folders behind URLs, with fsspec's own file systems, and wandb artifacts, with a stand-in for wandb's server."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dalle_torch.storage import resolve, resolve_model

FILES = {"config.json": b"{}", "model.safetensors": b"s" * 100, "flax_model.msgpack": b"f" * 100, "sub/notes.txt": b"n"}


def held(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


class TestUrl:
    @pytest.fixture
    def bucket(self) -> Iterator[MemoryFileSystem]:
        """A file system that is not this machine's disk, with FILES at memory://bucket/model."""
        system = fsspec.filesystem("memory")
        system.pipe({f"/bucket/model/{name}": content for name, content in FILES.items()})
        yield system
        system.rm("/bucket", recursive=True)

    def test_everything(self, bucket: MemoryFileSystem, tmp_path: Path) -> None:
        assert held(resolve("memory://bucket/model", cache_dir=tmp_path)) == FILES

    def test_one_weight_format(self, bucket: MemoryFileSystem, tmp_path: Path) -> None:
        folder = resolve_model("memory://bucket/model/", cache_dir=tmp_path)
        assert set(held(folder)) == {"config.json", "model.safetensors", "sub/notes.txt"}

    def test_subfolder(self, bucket: MemoryFileSystem, tmp_path: Path) -> None:
        assert held(resolve("memory://bucket", subfolder="model/sub", cache_dir=tmp_path)) == {"notes.txt": b"n"}

    def test_only_what_changed_is_downloaded_again(
        self, bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetched = []
        get_file = MemoryFileSystem.get_file

        def counted(self: MemoryFileSystem, source: str, target: str, **kwargs: object) -> None:
            fetched.append(source.rsplit("/", 1)[1])
            get_file(self, source, target, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
        resolve("memory://bucket/model", cache_dir=tmp_path)
        assert len(fetched) == len(FILES)
        fetched.clear()
        bucket.pipe("/bucket/model/config.json", b'{"new": 1}')
        bucket.rm("/bucket/model/flax_model.msgpack")
        folder = resolve("memory://bucket/model", cache_dir=tmp_path)
        assert fetched == ["config.json"]
        assert (folder / "config.json").read_bytes() == b'{"new": 1}'
        assert not (folder / "flax_model.msgpack").exists()

    def test_the_cache_serves_when_the_file_system_fails(
        self,
        bucket: MemoryFileSystem,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder = resolve("memory://bucket/model", cache_dir=tmp_path)

        def broken(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no route\nto host")

        monkeypatch.setattr(MemoryFileSystem, "find", broken)
        with caplog.at_level(logging.WARNING):
            assert resolve("memory://bucket/model", cache_dir=tmp_path) == folder
        assert "the copy in the cache is used" in caplog.text
        assert resolve("memory://bucket/model", cache_dir=tmp_path, local_files_only=True) == folder
        with pytest.raises(ConnectionError, match="the download failed and no whole copy is cached .*no route to host"):
            resolve("memory://bucket/model", cache_dir=tmp_path / "empty")

    def test_a_download_that_breaks_leaves_no_half_file(
        self, bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: MemoryFileSystem, source: str, target: str, **kwargs: object) -> None:
            Path(target).write_bytes(b"hal")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "get_file", broken)
            with pytest.raises(KeyboardInterrupt):
                resolve("memory://bucket/model", cache_dir=tmp_path)
        assert held(tmp_path) == {}
        with pytest.raises(FileNotFoundError, match="not whole in the cache"):
            resolve("memory://bucket/model", cache_dir=tmp_path, local_files_only=True)
        assert held(resolve("memory://bucket/model", cache_dir=tmp_path)) == FILES

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="memory://void has none of the files asked for; it has: no files"):
            resolve("memory://void", cache_dir=tmp_path)

    def test_a_local_url(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_bytes(b"{}")
        assert held(resolve(f"file://{tmp_path}/model", cache_dir=tmp_path / "cache")) == {"config.json": b"{}"}


class Artifact:
    """What `wandb.Api().artifact(...)` returns, as far as it is used."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.fetched = files, list[str]()
        entries = {name: SimpleNamespace(digest=repr(content)) for name, content in files.items()}
        self.manifest = SimpleNamespace(entries=entries)

    def get_entry(self, name: str) -> SimpleNamespace:
        def download(root: str, skip_cache: bool) -> str:
            self.fetched.append(name)
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
            return os.fspath(path)

        return SimpleNamespace(download=download)


class TestWandb:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact | Exception]:
        """Artifacts by their name."""
        import wandb

        artifacts: dict[str, Artifact | Exception] = {}

        def artifact(name: str) -> Artifact:
            found = artifacts.get(name, wandb.errors.CommError(f"artifact membership '{name}' not found"))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=artifact))
        return artifacts

    def test_the_wanted_files_only(self, served: dict, tmp_path: Path) -> None:
        served["team/dalle/mega:v3"] = artifact = Artifact({**FILES, "opt_state.msgpack": b"huge"})
        folder = resolve_model("team/dalle/mega:v3", cache_dir=tmp_path)
        assert set(held(folder)) == {"config.json", "model.safetensors", "sub/notes.txt"}
        assert resolve_model("team/dalle/mega:v3", cache_dir=tmp_path) == folder
        assert len(artifact.fetched) == 3, "the second time comes from the cache"

    def test_an_alias_that_moved(self, served: dict, tmp_path: Path) -> None:
        served["team/dalle/mega:latest"] = Artifact(FILES)
        resolve("team/dalle/mega:latest", cache_dir=tmp_path)
        served["team/dalle/mega:latest"] = moved = Artifact({"config.json": b"{}", "model.safetensors": b"newer"})
        assert held(resolve("team/dalle/mega:latest", cache_dir=tmp_path)) == moved.files
        assert moved.fetched == ["model.safetensors"]

    def test_without_a_network(self, served: dict, tmp_path: Path) -> None:
        import wandb

        name = "team/dalle/mega:v3"
        served[name] = wandb.errors.CommError("connection reset")
        with pytest.raises(ConnectionError, match="team/dalle/mega:v3: the download failed .*connection reset"):
            resolve(name, cache_dir=tmp_path)
        served[name] = Artifact(FILES)
        folder = resolve(name, cache_dir=tmp_path)
        served[name] = wandb.errors.CommError("connection reset")
        assert resolve(name, cache_dir=tmp_path) == folder
        assert resolve(name, cache_dir=tmp_path, local_files_only=True) == folder

    def test_an_unknown_artifact(self, served: dict, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="team/dalle/none:v0: no such artifact, or not for this account"):
            resolve("team/dalle/none:v0", cache_dir=tmp_path)

    @pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil"])
    def test_an_artifact_cannot_write_elsewhere(self, served: dict, tmp_path: Path, name: str) -> None:
        served["team/dalle/mega:v3"] = artifact = Artifact({"config.json": b"{}", name: b"x"})
        with pytest.raises(PermissionError, match="files that lead out of its folder, none was taken"):
            resolve("team/dalle/mega:v3", cache_dir=tmp_path)
        assert artifact.fetched == []

    def test_without_a_login(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real client, on a machine without credentials."""
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(PermissionError, match="wandb wants a login: run `wandb login` or set WANDB_API_KEY"):
            resolve("team/dalle/mega:v3", cache_dir=tmp_path)

    def test_without_wandb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'dalle-torch\[train\]'"):
            resolve("team/dalle/mega:v3", cache_dir=tmp_path)
