"""From pictures to a loss: what `encode` wrote is what the loader reads, and what the model takes."""

import io

import pytest
import torch
from PIL import Image

from dalle_torch.cli.main import main
from dalle_torch.config import DataConfig
from dalle_torch.data.datasets import TokenData
from dalle_torch.data.text import TextEncoder
from tests.shard_files import captioned, good_tar, read_tar, write_tar
from tests.tiny_pipeline import save_tiny, tiny_pipeline


@pytest.mark.parametrize("tokenised", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_to_a_loss(tokenised, workers, tmp_path):
    pipe = tiny_pipeline()
    model = save_tiny(tmp_path / "model", pipe)
    pictures = {}
    for index in range(3):
        pictures |= read_tar(good_tar(tmp_path / "in" / f"{index}.tar", 4 + index, 10 * index))
    write_tar(tmp_path / "in" / "3.tar", [("bad", captioned(99, jpg=b"junk"))])
    argv = ["encode", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--vqgan", str(model / "vqgan"),
            "--device", "cpu", *(["--tokenizer", str(model)] if tokenised else [])]  # fmt: skip
    assert main(argv) == 0

    config = DataConfig(
        train=[str(tmp_path / "out")], evaluation={"all": [str(tmp_path / "out")]}, lanes=1, workers=workers
    )
    data = TokenData(config=config, text=TextEncoder(pipe.processor), image_length=16, codebook_size=20, batch_size=5)
    images = {members["txt"].decode(): members["jpg"] for members in pictures.values()}
    seen = []
    batches = iter(data.training_loader())
    for batch in (next(batches) for _ in range(3)):
        assert torch.isfinite(pipe.model(**batch.inputs).loss)
        seen += [tuple(row.tolist()) for row in batch.labels]
    expected = {}
    for caption, jpg in images.items():
        codes = pipe.vqgan.encode(pipe.vqgan.images_to_pixels(Image.open(io.BytesIO(jpg))))
        expected[caption] = codes[0].tolist()
    assert sorted(seen) == sorted(map(tuple, expected.values())), "an epoch of 15 pictures"

    held_out = list(data.evaluation_loaders()["all"])
    assert len(held_out) == 3
    ids = pipe.processor(list(expected))["input_ids"]
    found = {
        tuple(row.tolist()): codes.tolist()
        for batch in held_out
        for row, codes in zip(batch.input_ids, batch.labels, strict=True)
    }
    assert found == {tuple(row.tolist()): codes for row, codes in zip(ids, expected.values(), strict=True)}
