"""Which pictures that cannot be read cost a sample, and which failures end the run."""

import errno
import os

import pytest

from dalle_torch.data.decoding import Decoder
from dalle_torch.data.shards import readable
from dalle_torch.data.sources import RawSample, Skip, _read_file
from dalle_torch.data.token_shard import PicturedSample
from tests.shard_files import picture

DECODER = Decoder(resolution=16, max_pixels=10_000, text=None)


def decode(read):
    return DECODER(RawSample("key", read, "caption"), "source")


def test_names_that_lead_to_no_file_cost_a_sample(tmp_path):
    (tmp_path / "file").write_bytes(picture())
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    names = ["absent", "folder", "file/below", "x" * 300, "loop", "nul\0", "loop/below"]
    for url in [*(f"{tmp_path}/{name}" for name in names), "nosuchsystem://a/b.jpg"]:
        found = decode(lambda url=url: _read_file(url))
        assert isinstance(found, Skip) and found.reason == "no_image", url
        assert "\n" not in found.detail
    assert isinstance(decode(lambda: _read_file(f"{tmp_path}/file")), PicturedSample)


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT])
@pytest.mark.parametrize("explained", [False, True])
def test_numbers_of_the_system(number, explained):
    def read():
        error = OSError(number, os.strerror(number))
        if explained:
            with readable("x.jpg"):
                raise error
        raise error

    assert decode(read).reason == "no_image"


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "no"), ConnectionError("x"), ImportError("gcsfs")]
)
def test_a_file_system_that_fails_ends_the_run(error):
    def read():
        with readable("x.jpg"):
            raise error

    with pytest.raises((OSError, ValueError), match="^x.jpg"):
        decode(read)
