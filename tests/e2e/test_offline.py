"""A model of the hub that was drawn with once is drawn with again when the hub is gone, as Mini and Mega are stored:
model and VQGAN in repositories of their own."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_torch.pipeline import DallePipeline
from dalle_torch.pipeline.loading import DEFAULT_VQGAN
from tests.hub_server import HubServer
from tests.tiny_pipeline import save_tiny


@pytest.fixture
def commit(hub: HubServer, tmp_path: Path) -> str:
    """The commit of `org/model`, which brings no VQGAN."""
    folder = save_tiny(tmp_path / "model")
    shutil.move(folder / "vqgan", tmp_path / "vqgan")
    hub.add_repo(DEFAULT_VQGAN, tmp_path / "vqgan")
    return hub.add_repo("org/model", folder)


@pytest.mark.parametrize("fail", [HubServer.stop, lambda hub: hub.refuse(429)], ids=["gone", "429"])
@pytest.mark.parametrize("options", [{}, {"revision": "commit"}, {"local_files_only": True}], ids=str)
def test_the_cache_is_enough(hub: HubServer, commit: str, fail: Callable[[HubServer], None], options: dict) -> None:
    options = {name: commit if value == "commit" else value for name, value in options.items()}
    before = DallePipeline.from_pretrained("org/model", **options | {"local_files_only": False})
    fail(hub)
    after = DallePipeline.from_pretrained("org/model", **options)
    assert after("a").images[0].tobytes() == before("a").images[0].tobytes()
    assert after.model_hash == f"commit:{commit}"


def test_the_offline_variable_is_enough(hub: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    DallePipeline.from_pretrained("org/model")
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert DallePipeline.from_pretrained("org/model")("a").images


def test_a_model_without_a_vqgan_loads_without_a_warning(
    hub: HubServer, commit: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        DallePipeline.from_pretrained("org/model")
    assert not caplog.records
