"""Saving: whole files, with everybody's access rights, or none; and what cannot be saved."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dalle_torch.models import packing
from dalle_torch.models.dalle_bart import DalleBart
from dalle_torch.models.packing import pack_for_drawing
from tests.hub_server import HubServer
from tests.tiny_pipeline import tiny_model, tiny_pipeline
from tests.unit.models.conftest import small_model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_weights_get_the_access_rights_of_any_new_file(model: DalleBart, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    finally:
        os.umask(before)
    files = [path for name in ("one", "many") for path in (tmp_path / name).iterdir()]
    assert len(files) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_another_number_of_files_leaves_nothing_of_the_last(tmp_path: Path) -> None:
    first, second = small_model(), small_model(init_std=0.1)
    (tmp_path / "notes").write_text("mine")
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="20KB")
    assert "model.safetensors" not in names(tmp_path)
    assert torch.equal(DalleBart.from_pretrained(tmp_path).lm_head.weight, second.lm_head.weight)
    first.save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors", "notes"}
    assert torch.equal(DalleBart.from_pretrained(tmp_path).lm_head.weight, first.lm_head.weight)


def test_a_failure_halfway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half")
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="weights cannot be written: I/O error: File too large") as error:
        small_model(dropout=0.5).save_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_folder_to_save_to(model: DalleBart, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file: name a folder"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_packed_model_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layouts need oneDNN, which some builds of torch lack; that a layer is packed is all that counts here.
    monkeypatch.setattr(packing.BlockedLinear, "__init__", packing._DrawingLinear.__init__)
    monkeypatch.setattr(packing, "can_pack", lambda model: True)
    pipe = tiny_pipeline()
    pack_for_drawing(pipe.model)
    message = r"\d+ layers \(decoder\.layers\.0.*\) are packed for drawing .* load the model again"
    for part in (pipe, pipe.model):
        with pytest.raises(ValueError, match=message):
            part.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_saved_model_is_uploaded_and_nothing_beside_it(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    model = tiny_model()
    model.save_pretrained(folder, push_to_hub=True, repo_id="tester/mini", token="t")
    assert torch.equal(DalleBart.from_pretrained("tester/mini").lm_head.weight, model.lm_head.weight)
    uploaded = list(hub.repos["tester/mini"].commits.values())[-1]
    assert "model.safetensors" in uploaded
    assert "diary.txt" not in uploaded
