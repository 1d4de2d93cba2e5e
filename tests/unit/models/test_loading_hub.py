"""Models from a hub on this machine, through the real client."""

import json
import shutil
from pathlib import Path

import pytest

from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS
from tests.hub_server import HubServer
from tests.unit.models.test_loading import GOLDEN, model, same, saved

__all__ = ["model", "saved"]  # fixtures


def test_one_format_is_downloaded_and_then_kept(hub: HubServer, model: DalleBart) -> None:
    commit = hub.add_repo("org/mini", GOLDEN)
    found = DalleBart.from_pretrained("org/mini")
    assert same(found, model)
    assert found.config.name_or_path == "org/mini"
    assert not any("io.npz" in path for path in hub.paths())
    hub.stop()
    assert same(DalleBart.from_pretrained("org/mini", local_files_only=True), model)
    assert same(DalleBart.from_pretrained("org/mini", revision=commit), model)


def test_revision_token_and_subfolder(hub: HubServer, model: DalleBart, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "repo" / "inner")
    (tmp_path / "repo" / "config.json").write_text(json.dumps({"model_type": "bart"}))
    hub.add_repo("org/private", tmp_path / "repo", revision="v1", token="secret")
    options = {"revision": "v1", "subfolder": "inner", "cache_dir": tmp_path / "cache"}
    assert same(DalleBart.from_pretrained("org/private", token="secret", **options), model)
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(FileNotFoundError, match="v2"):
        DalleBart.from_pretrained("org/private", token="secret", **{**options, "revision": "v2"})


def test_pickles_are_not_even_downloaded(hub: HubServer) -> None:
    hub.add_repo("org/min-dalle", GOLDENS / "min-dalle")
    with pytest.raises(CheckpointError, match="pickled weights are read only with trust_pickle=True"):
        DalleBart.from_pretrained("org/min-dalle")
    assert not any(path.endswith(".pt") for path in hub.paths())


def test_a_saved_model_goes_to_the_hub_and_comes_back(hub: HubServer, model: DalleBart) -> None:
    model.push_to_hub("tester/mini", token="t")
    assert same(DalleBart.from_pretrained("tester/mini"), model)
