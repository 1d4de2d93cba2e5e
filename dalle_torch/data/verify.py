"""Whether a folder's shards are still what was written: sizes and checksums against its manifest and records.

Owns: the comparison and its report. Does not own: the folder (`manifest`), what is in a shard (`tokens`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from dalle_torch.data.manifest import MANIFEST, ShardFolder, ShardRecord
from dalle_torch.data.shards import open_shard, readable
from dalle_torch.log import get_logger, progress

logger = get_logger(__name__)

_CHUNK: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A folder in which nothing is wrong."""

    shards: int
    samples: int
    bytes: int
    complete: bool
    """Whether the manifest says that every part of the input has its shard."""


def verify(folder: ShardFolder) -> Verified:
    """Read all shards of `folder` again; each that is not as recorded is logged.

    Raises:
        FileNotFoundError: there is no manifest.
        OSError: a file system cannot be read.
        ValueError: shards are not there, of another size or of another content, or no record knows them. All are named.
    """
    manifest = folder.manifest()
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: is it a folder that encode wrote?")
    records = list(manifest.shards)
    known = {record.name for record in records if isinstance(record.name, str)}
    # Those of a host that was killed before it could sum them up.
    records += [record for name, record in folder.all_records().items() if name not in known]
    sizes = folder.sizes()
    names = {record.name for record in records if isinstance(record.name, str)}
    strangers = sorted(name for name in sizes.keys() - names if name.endswith(".tar") and not name.startswith("."))
    wrong = [*_wrong(folder, records, sizes), *(f"{name} is in no record" for name in strangers)]
    if wrong:
        for phrase in wrong:
            logger.warning("%s/%s", folder, phrase)
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(records) + len(strangers)} shards are not what the manifest says: "
            f"{'; '.join(wrong)}. Remove them and run the same encode again, which makes them anew"
        )
    return Verified(
        shards=len(records),
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        complete=manifest.complete,
    )


def _wrong(folder: ShardFolder, records: Sequence[ShardRecord], sizes: dict[str, int]) -> list[str]:
    """A phrase for each shard that is not as recorded."""
    found = []
    total = sum(sizes.get(record.name, 0) for record in records if isinstance(record.name, str))
    with progress(total=total, desc="verifying", unit="B") as bar:
        bar.unit_scale = True
        for record in records:
            if not isinstance(record.name, str) or type(record.samples) is not int or record.samples < 0:
                found.append(f"{record.name!s:.60} has a record that cannot be true")
            elif record.name not in sizes:
                found.append(f"{record.name} is not there")
            elif sizes[record.name] != record.bytes:
                bar.update(sizes[record.name])
                found.append(f"{record.name} has {sizes[record.name]:,} bytes, not {record.bytes!r}")
            elif (content := _sha256(f"{folder}/{record.name}", bar)) != record.sha256:
                found.append(f"{record.name} has sha256 {content[:12]}..., not {record.sha256!s:.12}...")
    return found


def _sha256(url: str, bar: Any) -> str:
    digest = hashlib.sha256()
    with open_shard(url) as file, readable(url):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
