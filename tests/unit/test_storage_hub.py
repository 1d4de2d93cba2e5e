"""Downloads with the real huggingface_hub client from a hub on this machine."""

import logging
import shutil
from pathlib import Path

import pytest

from dalle_torch.storage import resolve, resolve_model
from tests.hub_server import HubServer

FILES = {
    "config.json": b'{"model_type": "dallebart"}',
    "README.md": b"a model",
    "model.safetensors": b"s" * 3000,
    "flax_model.msgpack": b"f" * 5000,
    "vqgan/config.json": b"{}",
    "vqgan/model.safetensors": b"v" * 100,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_downloads_everything_and_takes_it_from_the_cache_the_second_time(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve("org/model")
    assert contents(folder) == FILES
    hub.requests.clear()
    assert resolve("org/model") == folder
    assert not [path for path in hub.paths() if "/resolve/" in path], "no file is downloaded again"


def test_patterns_and_subfolder_keep_the_download_small(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    assert set(contents(resolve("org/model", allow_patterns=["config.json"]))) == {"config.json"}
    assert contents(resolve("org/model", subfolder="vqgan", allow_patterns=["*.json"])) == {"config.json": b"{}"}
    assert not [path for path in hub.paths() if path.endswith((".safetensors", ".msgpack"))]


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        ({"model.safetensors", "flax_model.msgpack"}, {"model.safetensors"}),
        (
            {"model.safetensors.index.json", "model-00001-of-00001.safetensors", "flax_model.msgpack"},
            {"model.safetensors.index.json", "model-00001-of-00001.safetensors"},
        ),
        ({"flax_model.msgpack", "opt_state.msgpack", "pytorch_model.bin"}, {"flax_model.msgpack"}),
        ({"encoder.pt", "decoder.pt", "other.bin"}, {"encoder.pt", "decoder.pt"}),
    ],
)
def test_one_weight_format_is_downloaded(hub: HubServer, held: set[str], taken: set[str]) -> None:
    hub.add_repo("org/model", {"config.json": b"{}", **{name: name.encode() for name in held}})
    assert set(contents(resolve_model("org/model"))) == {"config.json"} | taken


def test_the_callers_order_of_formats_decides(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve_model("org/model", weight_formats=[("flax_model.msgpack",), ("model.safetensors",)])
    assert "flax_model.msgpack" in contents(folder)
    assert "model.safetensors" not in contents(folder)


def test_weights_below_a_subfolder(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    assert set(contents(resolve_model("org/model", subfolder="vqgan"))) == {"config.json", "model.safetensors"}


def test_a_repository_without_weights_says_what_it_holds(hub: HubServer) -> None:
    hub.add_repo("org/model", {"config.json": b"{}", "tf_model.h5": b"h"})
    with pytest.raises(FileNotFoundError, match=r"org/model has no weights .*model\.safetensors.*tf_model\.h5"):
        resolve_model("org/model")


def test_branches_and_commits(hub: HubServer) -> None:
    first = hub.add_repo("org/model", {"config.json": b"1"})
    hub.add_repo("org/model", {"config.json": b"2"})
    hub.add_repo("org/model", {"config.json": b"3"}, revision="draft/three")
    for revision, content in ((None, b"2"), ("main", b"2"), ("draft/three", b"3"), (first, b"1")):
        assert (resolve("org/model", revision=revision) / "config.json").read_bytes() == content


def test_a_new_commit_is_downloaded(hub: HubServer) -> None:
    hub.add_repo("org/model", {"config.json": b"1"})
    resolve("org/model")
    hub.add_repo("org/model", {"config.json": b"2"})
    assert (resolve("org/model") / "config.json").read_bytes() == b"2"


def test_a_pinned_commit_in_the_cache_asks_nobody(hub: HubServer) -> None:
    commit = hub.add_repo("org/model", FILES)
    folder = resolve_model("org/model", revision=commit)
    hub.requests.clear()
    assert resolve_model("org/model", revision=commit) == folder
    assert hub.requests == []


def test_a_broken_download_goes_on_where_it_broke(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 40
    hub.add_repo("org/model", {"model.safetensors": content})
    # The client writes whole chunks, of 10 MiB; smaller ones let a small file break in the middle.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut(4321)
    folder = resolve_model("org/model")
    assert (folder / "model.safetensors").read_bytes() == content
    assert [seen.range for seen in hub.requests if seen.method == "GET" and "/resolve/" in seen.path] == [
        None,
        "bytes=4000-",
    ]


def test_without_a_network_the_cache_serves_with_a_word_about_it(
    hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve_model("org/model")
    hub.stop()
    with caplog.at_level(logging.WARNING, logger="dalle_torch"):
        assert resolve_model("org/model") == folder
    assert len(caplog.messages) == 1
    assert "org/model: the copy in the cache is used" in caplog.messages[0]


def test_offline_mode_of_the_hub_client(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve_model("org/model")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("org/model") == folder
    assert "HF_HUB_OFFLINE is set" in caplog.text
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set and org/other .* is not whole in the cache"):
        resolve("org/other")
    assert hub.requests == []


def test_local_files_only_asks_nobody(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve("org/model")
    hub.requests.clear()
    assert resolve("org/model", local_files_only=True) == folder
    with pytest.raises(FileNotFoundError, match=r"org/other .* is not in the cache.*local_files_only"):
        resolve("org/other", local_files_only=True)
    assert hub.requests == []


def test_half_a_snapshot_is_not_taken_for_the_model(hub: HubServer) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"x" * i for i in (1, 2)}
    hub.add_repo("org/model", {"config.json": b"{}", "model.safetensors.index.json": b"{}", **shards})
    folder = resolve_model("org/model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not whole"):
        resolve_model("org/model", local_files_only=True)
    hub.stop()
    with pytest.raises(ConnectionError, match="not whole in the cache"):
        resolve_model("org/model")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {},
            PermissionError,
            r"answered 401 for org/secret: it does not exist or is private; .*HF_TOKEN.*hf auth login",
        ),
        (
            {"token": "hf_wrong"},
            FileNotFoundError,
            r"answered 404 for org/secret: no such repository, and no such folder",
        ),
    ],
)
def test_a_private_repository(hub: HubServer, options: dict, error: type[Exception], message: str) -> None:
    hub.add_repo("org/secret", FILES, token="hf_right")
    with pytest.raises(error, match=message):
        resolve("org/secret", **options)
    assert contents(resolve("org/secret", token="hf_right")) == FILES


def test_a_gated_repository(hub: HubServer) -> None:
    hub.add_repo("org/gated", FILES, gated=True)
    with pytest.raises(PermissionError, match=rf"org/gated is gated .*accept its terms at {hub.endpoint}/org/gated"):
        resolve("org/gated")


def test_an_unknown_revision(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    resolve("org/model")
    with pytest.raises(FileNotFoundError, match="org/model has no revision 'v9': name a branch, tag or commit"):
        resolve("org/model", revision="v9")


@pytest.mark.parametrize(
    ("status", "headers", "error", "message"),
    [
        (403, {}, PermissionError, "answered 403 for org/model: the token may not read it"),
        (
            429,
            {"Retry-After": "37"},
            ConnectionError,
            "answered 429, too many requests, for org/model: wait 37 s, or pass",
        ),
        (429, {}, ConnectionError, "wait some minutes"),
        (503, {}, ConnectionError, "answered 503 for org/model: try again later"),
    ],
)
def test_refusals(hub: HubServer, status: int, headers: dict, error: type[Exception], message: str) -> None:
    hub.add_repo("org/model", FILES)
    hub.refuse(status, headers=headers)
    with pytest.raises(error, match=message) as caught:
        resolve_model("org/model")
    assert "\n" not in str(caught.value)


def test_a_refusal_with_a_copy_in_the_cache(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve_model("org/model")
    hub.refuse(429)
    assert resolve_model("org/model") == folder
    assert "answered 429" in caplog.text


def test_a_file_that_is_refused_while_downloading(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    hub.refuse(403, path=".*/resolve/.*safetensors")
    with pytest.raises(PermissionError, match="answered 403 for org/model"):
        resolve_model("org/model")


def test_without_network_or_cache(hub: HubServer) -> None:
    hub.stop()
    with pytest.raises(
        ConnectionError, match=r"could not be reached .*org/model \(revision main\) is not whole"
    ) as caught:
        resolve("org/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", ["../../etc", "/etc/passwd", ""])
def test_a_revision_cannot_leave_the_cache(hub: HubServer, revision: str) -> None:
    with pytest.raises(ValueError, match="is no name of a branch, tag or commit"):
        resolve("org/model", revision=revision, local_files_only=True)


def test_the_address_of_the_page_is_as_good_as_the_id(hub: HubServer) -> None:
    hub.add_repo("org/model", FILES)
    assert resolve("https://huggingface.co/org/model/") == resolve("hf://org/model") == resolve("org/model")


def test_cache_dir(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    folder = resolve("org/model", cache_dir=tmp_path / "elsewhere")
    assert folder.is_relative_to(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        resolve("org/model", cache_dir=tmp_path / "elsewhere", local_files_only=True)
