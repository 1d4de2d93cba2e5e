"""Small real files for the tests of `data`: pictures, tars, damage of every kind."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Members = Mapping[str, bytes]


def picture(seed: int = 0, size: tuple[int, int] = (20, 24), format: str = "JPEG", **options: Any) -> bytes:
    """An encoded picture of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encoded(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST), format, **options)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A PNG of `side` x `side` pixels that is tiny as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(squeezer.compress(row) for _ in range(side)) + squeezer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def captioned(number: int, **members: bytes) -> dict[str, bytes]:
    """The members of a good sample; those given replace or add to them."""
    return {"jpg": picture(number), "txt": f"picture {number}".encode()} | members


def write_tar(path: Path, samples: Iterable[tuple[str, Members]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar with the members of each (key, members) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def good_tar(path: Path, count: int = 5, first: int = 0) -> Path:
    return write_tar(path, ((f"{number:05d}", captioned(number)) for number in range(first, first + count)))


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, as Python's own reader sees it."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            file = archive.extractfile(member)
            assert file is not None
            assert extension not in found.setdefault(key, {})
            found[key][extension] = file.read()
    return found


def jsonl(path: Path, lines: Iterable[Mapping[str, Any] | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


CODES, CODEBOOK = 16, 20
"""Of `tests.tiny_pipeline`."""


def codes_of_number(number: int) -> np.ndarray:
    """Codes that tell which sample they belong to."""
    return np.array([number // CODEBOOK**place % CODEBOOK for place in range(CODES)], dtype=np.uint16)


def number_of_codes(codes: Any) -> int:
    return sum(int(code) * CODEBOOK**place for place, code in enumerate(codes))


def tokenised(number: int, **members: bytes) -> dict[str, bytes]:
    """The members of a good sample of tokens; those given replace or add to them."""
    return {"npy": npy(codes_of_number(number)), "txt": f"n{number}".encode()} | members


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def token_tar(path: Path, numbers: Iterable[int]) -> Path:
    return write_tar(path, ((f"{number:05d}", tokenised(number)) for number in numbers))


def token_parquet(path: Path, numbers: Iterable[int], row_group: int = 7, **columns: list[Any]) -> Path:
    """As the original project stored them: `caption` and `encoding`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = list(numbers)
    encoding = [codes_of_number(number).tolist() for number in numbers]
    table = {"caption": [f"n{number}" for number in numbers], "encoding": encoding} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=row_group)
    return path


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """The items of all `lists`, one after another."""
    return list(chain.from_iterable(lists))
