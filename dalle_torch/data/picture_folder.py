"""A folder of pictures with `metadata.jsonl`: whether it is one, its lines, and the names that files may have.

Owns: these. Does not own: what a line says, reading pictures (`sources`).
"""

import io
from collections.abc import Iterator
from typing import Any, Final

from dalle_torch.data.captions import MAX_JSON_BYTES
from dalle_torch.data.shards import file_system, is_there, readable

METADATA: Final = "metadata.jsonl"


def image_folder(name: str) -> str | None:
    """The folder that `name` is, if `metadata.jsonl` is in it."""
    name = name.removesuffix(f"/{METADATA}").rstrip("/") if name.endswith(f"/{METADATA}") else name.rstrip("/")
    # Says what is wrong with the name itself.
    file_system(name)
    with readable(name):
        return name if is_there(f"{name}/{METADATA}") else None


def lines_of(file: Any, offset: int) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, line) of every line that is not blank; one that is too long comes empty."""
    file.seek(offset)
    buffered = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
    while line := buffered.readline(MAX_JSON_BYTES + 1):
        offset += len(line)
        if len(line) > MAX_JSON_BYTES:
            while not line.endswith(b"\n") and (line := buffered.readline(MAX_JSON_BYTES)):
                offset += len(line)
            line = b"too long"
        if line.strip():
            yield offset, line


def is_file_name(name: str) -> bool:
    """Whether a file may be called so at all: no zero byte, no halves of a UTF-16 pair, which JSON lets through."""
    return "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)
