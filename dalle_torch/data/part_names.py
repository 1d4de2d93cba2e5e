"""What the pieces of the input are called: their places, and names for their shards that no two share.

Owns: telling files of one name in several folders apart. Does not own: finding the files (`shards`).
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from dalle_torch.data.shards import is_remote, local_path

_MAX_FOLDERS: Final = 8
"""Folders above a file that its shard's name may have in front."""


def place(url: str, length: int) -> str:
    """The last `length` pieces of a path or URL, equal on hosts where the same files lie under another root."""
    path = url.partition("://")[2] if is_remote(url) else os.path.abspath(local_path(url))
    return "/".join([piece for piece in path.replace(os.sep, "/").split("/") if piece][-length:])


def distinct_names(names: Sequence[str], urls: Sequence[str]) -> list[str]:
    """`names`, those that several have with as many of the folders that their URLs lie in as tell them apart."""
    found = list(names)
    for folders in range(1, _MAX_FOLDERS + 1):
        if not (shared := _shared(found)):
            return found
        for index in shared:
            above = PurePosixPath(place(urls[index], folders + 1)).parts[:-1]
            found[index] = "-".join([*above, names[index]])
    for index in _shared(found):
        found[index] = f"{names[index]}-{hashlib.sha256(urls[index].encode(errors='replace')).hexdigest()[:8]}"
    return found


def _shared(names: Sequence[str]) -> list[int]:
    """Places of the names that are there more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        places[name].append(index)
    return [index for indices in places.values() if len(indices) > 1 for index in indices]
