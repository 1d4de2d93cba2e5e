"""Names, patterns and URLs to files; every way in which they lead nowhere is one line."""

import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dalle_torch.data.shards import find_shards, open_shard
from tests.shard_files import good_tar


@pytest.fixture
def folder(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b.parquet", "notes.txt", ".tmp-1-a-2.tar", "sub/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    return tmp_path


def names(patterns):
    return [shard.name for shard in find_shards(patterns)]


def test_folders_globs_braces_and_lists(folder):
    assert names(str(folder)) == ["a-0.tar", "a-1.tar", "b.parquet"]
    assert names(f"{folder}/*.tar") == ["a-0.tar", "a-1.tar"]
    assert names(f"{folder}/a-{{0..1}}.tar") == ["a-0.tar", "a-1.tar"]
    assert names(f"{folder}/{{a-0,sub/c}}.tar") == ["a-0.tar", "c.tar"]
    assert names([f"{folder}/a-1.tar", f"{folder}/*"]) == ["a-0.tar", "a-1.tar", "b.parquet"], "each once"
    assert names(f"file://{folder}/a-0.tar") == ["a-0.tar"]
    (shard,) = find_shards(f"{folder}/a-1.tar")
    assert (shard.size, shard.stem, shard.folder, shard.is_parquet) == (7, "a-1", str(folder), False)


def test_a_relative_name_stays_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [shard.url for shard in find_shards("*.tar")] == ["a-0.tar", "a-1.tar"]
    assert find_shards("a-0.tar")[0].folder == "."


@pytest.mark.parametrize(
    "name", ["x[1].tar", "x*.tar", "x?.tar", "x{1..2}.tar", "x{.tar", "[ab]/x.tar", "d[1]/x{1}.tar"]
)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_what_is_there_comes_before_what_it_would_stand_for(name, kind, tmp_path):
    root = str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}"
    system = fsspec.filesystem("file" if kind == "local" else "memory")
    for other in (name, "x1.tar", "x2.tar", "a/x.tar", "d1/x1.tar"):
        system.makedirs(f"{root}/{other}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{other}", b"x")
    (shard,) = find_shards(f"{root}/{name}")
    assert shard.url.endswith(f"/{name}")
    with open_shard(shard.url) as file:
        assert file.read() == b"x"


def test_patterns_below_a_folder_with_brackets(tmp_path):
    for name in ("out[1]/a.tar", "out[1]/b[2]/c.tar", "out1/d.tar", "out2/e.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(f"{tmp_path}/out[1]") == names(f"{tmp_path}/out[1]/*.tar") == ["a.tar"]
    assert names(f"{tmp_path}/out[1]/b[2]/*") == ["c.tar"]
    assert names(f"{tmp_path}/out[12]/*.tar") == ["d.tar", "e.tar"]
    assert names(f"{tmp_path}/out[1]/{{a,b[2]/c}}.tar") == ["a.tar", "c.tar"]


def test_any_file_system_of_fsspec(tmp_path):
    root = f"memory://{uuid.uuid4().hex}"
    system = fsspec.filesystem("memory")
    for index in range(3):
        system.pipe_file(f"{root}/t-{index}.tar", bytes(index))
    found = find_shards(f"{root}/t-{{0..2}}.tar")
    assert [shard.size for shard in found] == [0, 1, 2]
    assert names(root) == names(f"{root}/t-*.tar") == ["t-0.tar", "t-1.tar", "t-2.tar"]
    with open_shard(found[2].url) as file:
        assert file.read() == bytes(2)


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("{root}/*.zip", FileNotFoundError, "no shard matches {root}/*.zip"),
        ("{root}/none.tar", FileNotFoundError, "no shard matches {root}/none.tar"),
        ("{root}/a-{{0..4}}.tar", FileNotFoundError, "5 shards, of which 3 are not: {root}/a-2.tar, "),
        ("{root}/a-{{0..1.tar", ValueError, "its braces do not match"),
        ("{root}/a-{{0..99999999}}.tar", ValueError, "more than 1,000,000 shards"),
        ("pipe:cat x.tar", ValueError, "commands are not run"),
        ("nosuch://x.tar", ValueError, "nosuch://x.tar cannot be opened: Protocol not known: nosuch"),
        ("", ValueError, "no shards are named"),
        ("memory://nowhere/a.tar", FileNotFoundError, "no shard matches memory://nowhere/a.tar"),
    ],
)
def test_what_leads_nowhere(pattern, error, message, folder):
    with pytest.raises(error) as caught:
        find_shards(pattern.format(root=folder))
    assert message.format(root=folder) in str(caught.value)
    assert "\n" not in str(caught.value)


class Bucket(MemoryFileSystem):
    """A bucket that fails with what `failure` says."""

    protocol = "bucket"
    failure: Exception = RuntimeError()

    def info(self, *args, **kwargs):
        raise self.failure

    exists = isdir = _open = ls = glob = makedirs = put_file = info


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (PermissionError("Forbidden"), PermissionError, "bucket://b/a.tar may not be read: Forbidden"),
        (
            RuntimeError("no\ncredentials"),
            ConnectionError,
            "bucket://b/a.tar cannot be read: RuntimeError: no credentials",
        ),
        (TimeoutError(), ConnectionError, "bucket://b/a.tar cannot be read: TimeoutError"),
        (ImportError("install gcsfs"), ValueError, "needs a package that is not installed: install gcsfs"),
    ],
)
def test_a_bucket_that_cannot_be_read(failure, error, message, monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "failure", failure)
    for pattern in ("bucket://b/a.tar",):
        with pytest.raises(error) as caught:
            find_shards(pattern)
        assert message in str(caught.value)
    with pytest.raises(error), open_shard("bucket://b/a.tar"):
        pass


def test_a_folder_is_no_shard(folder):
    with pytest.raises(OSError), open_shard(str(folder)):
        pass
    assert good_tar(folder / "x.tar").is_file()
