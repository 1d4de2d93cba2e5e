"""Writing one shard of tokens: a webdataset tar, byte for byte the same for the same samples.

Owns: which members a sample has and how they are named. Does not own: where the file ends up (`manifest`), reading it
(`tokens`).
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import numpy as np

if TYPE_CHECKING:
    from dalle_torch.data.sources import RawSample
    from dalle_torch.data.text import TextEncoder

CODES: Final = "npy"
"""Member with the codes, uint16 [T]."""
CAPTION: Final = "txt"
TOKENS: Final = "tokens.npy"
"""Member with the caption's token ids, uint16 or int32, its ends included and the padding not."""
FIELDS: Final = "json"
OFFSET_STRIDE: Final = 256
"""Samples between places in a shard that are known without reading up to them."""


@dataclass(slots=True)
class PicturedSample:
    """A sample whose picture waits for the network."""

    key: str
    picture: np.ndarray
    """uint8 [resolution, resolution, 3]."""
    members: dict[str, bytes]
    """What is written beside the codes."""


class TokenShardWriter:
    """Writes samples in the order they come, in a thread of its own.

    Raises:
        ValueError: webdataset is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._writer = _tar_writer(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future[None] | None = None
        self._written = 0
        self.offsets: list[int] = []
        """Where every `OFFSET_STRIDE`th sample begins, in bytes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        try:
            if kind is None:
                self._wait()
                self._writer.close()
        finally:
            # Of a file that is thrown away too: the archive would complain when it is collected.
            with suppress(Exception):
                self._writer.close()
            self._file.close()

    def write(self, batch: Sequence[PicturedSample], codes: np.ndarray) -> None:
        """Leave `batch` and its codes, [B, T], to the thread; raises OSError where an earlier one failed."""
        self._wait()
        self._pending = self._thread.submit(self._write, batch, codes)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write(self, batch: Sequence[PicturedSample], codes: np.ndarray) -> None:
        for item, row in zip(batch, codes, strict=True):
            if self._written % OFFSET_STRIDE == 0:
                self.offsets.append(self._writer.tarstream.offset)
            self._written += 1
            self._writer.write({"__key__": item.key, CODES: to_npy(row.astype(np.uint16)), **item.members})


class RawTarWriter:
    """Writes samples as they are, member by member.

    Raises:
        ValueError: webdataset is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._writer = _tar_writer(path)
        self._written = 0
        self.offsets: list[int] = []
        """Where every `OFFSET_STRIDE`th sample begins, in bytes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._file.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        if self._written % OFFSET_STRIDE == 0:
            self.offsets.append(self._writer.tarstream.offset)
        self._written += 1
        self._writer.write({"__key__": key, **members})


def _tar_writer(path: Path) -> tuple[BinaryIO, Any]:
    # Read when webdataset is imported: without it, its readers run commands that names of shards hold.
    os.environ["WDS_SECURE"] = "1"
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise ValueError(f"writing shards needs webdataset: pip install 'dalle-torch[train]' ({error})") from error
    file = path.open("wb")
    return file, TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="")


def text_members(
    sample: "RawSample", source: str, size: tuple[int, int], text: "TextEncoder | None"
) -> dict[str, bytes]:
    """The members of a sample beside its codes.

    Args:
        source: file of the input; a `source` of the sample's own goes before it.
        size: width and height of the picture before it was cropped.
        text: adds the normalised caption to the JSON, and its token ids.
    """
    width, height = size
    known: dict[str, Any] = {"source": source, **sample.metadata, "width": width, "height": height}
    members = {CAPTION: sample.caption.encode()}
    if text is not None:
        known["normalized"] = text.normalize(sample.caption)
        (ids,) = text.tokenize([known["normalized"]])
        members[TOKENS] = to_npy(ids.astype(np.uint16) if ids.max(initial=0) < 1 << 16 else ids)
    members[FIELDS] = json.dumps(known, ensure_ascii=False).encode("utf-8", "replace")
    return members


def to_npy(values: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
