"""What a folder of token shards says about itself: `manifest.json`, and a record of each shard beside it.

A folder written by `encode`:

    manifest.json           format, settings, totals, and every shard's record; rewritten now and then, and at the end
    records/NAME.json       one shard: source, samples, bytes, sha256, skipped samples by reason
    NAME.tar                webdataset: KEY.txt the caption, KEY.npy the codes (uint16 [T]), KEY.json what is known,
                            and, where a tokenizer was given, KEY.tokens.npy (uint16 or int32, unpadded)

The record is written last: a shard without one is not committed. Records are what counts, the manifest is their sum,
so hosts that share a folder need not talk to each other. After a host was killed the manifest may lack the shards of
its last minute, until the command is run again.

Owns: these files and their checks; where they lie (a folder here, or a URL). Does not own: what is in a shard.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

from dalle_torch.data.shards import file_system, is_remote, local_path, readable
from dalle_torch.storage import atomic_file

FORMAT: Final = "dalle_torch.tokens.1"
MANIFEST: Final = "manifest.json"
RECORDS: Final = "records"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all shards of a folder have in common; a folder takes no shard made with others."""

    vqgan: str
    """SHA-256 of the network's configuration and weights."""
    resolution: int
    """Pixels of a picture's side."""
    image_length: int
    """Codes of a picture."""
    codebook_size: int
    dtype: str
    """What the network computed in."""
    caption_key: str | None = None
    text: str | None = None
    """Fingerprint of the tokenizer and normalisation behind the stored token ids (`TextEncoder.fingerprint`)."""

    @property
    def digest(self) -> str:
        """Short, and another one where any field is; every record has that of its shard."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "Settings") -> list[str]:
        """One phrase for each field that is not equal, ours first."""
        pairs = [(item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self)]
        return [f"{name} {_short(ours)}, not {_short(theirs)}" for name, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One committed shard."""

    name: str
    source: str
    """The part of the input that it was made from, with the folder that it lay in."""
    samples: int
    bytes: int
    sha256: str
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys of the samples that were left out."""
    offsets: list[int] = field(default_factory=list)
    """Bytes at which sample 0, `token_shard.OFFSET_STRIDE`, twice that and so on begin."""
    source_bytes: int = -1
    """Of the part of the input when it was read."""
    settings: str = ""
    """`Settings.digest` of what it was made with."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A folder's settings and records."""

    settings: Settings
    shards: Sequence[ShardRecord]
    complete: bool
    """Whether every part of the input has its shard."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> samples."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update({reason: len(keys) for reason, keys in shard.skipped.items()})
        return dict(sorted(counts.items()))

    def to_json(self) -> str:
        values = {
            "format": FORMAT,
            "complete": self.complete,
            "settings": asdict(self.settings),
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "skipped": self.skipped,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Raises ValueError where `text` is no manifest of this format."""
        try:
            values = json.loads(text)
            found = values["format"]
            if found != FORMAT:
                raise ValueError(f"its format is {found!r}, and {FORMAT!r} is read here")
            settings = Settings(**values["settings"])
            shards = [ShardRecord(**shard) for shard in values["shards"]]
            complete = bool(values["complete"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no manifest of token shards: {_line(error)}") from error
        return cls(settings=settings, shards=shards, complete=complete)


class ShardFolder:
    """A folder of token shards on this machine or behind a URL; files appear in it whole or not at all."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.remote = is_remote(url)
        self.fs, self._root = file_system(self.url)

    def __str__(self) -> str:
        return self.url

    def manifest(self) -> Manifest | None:
        """What `manifest.json` says; None where there is none.

        Raises:
            ValueError: it is damaged or of another format.
        """
        text = self.read_text(MANIFEST)
        return None if text is None else Manifest.from_json(text, f"{self.url}/{MANIFEST}")

    def records(self) -> dict[str, ShardRecord]:
        """Committed shards by name; a record whose shard is not there with its size does not count."""
        records, sizes = self.all_records(), self.sizes()
        return {name: record for name, record in records.items() if sizes.get(name) == record.bytes}

    def all_records(self) -> dict[str, ShardRecord]:
        """Every record that can be read, by the name of its shard, which may be gone or of another size."""
        with readable(self.url):
            self.fs.invalidate_cache()
            names = sorted(self._sizes(f"{self._root}/{RECORDS}"))
            paths = [f"{self._root}/{RECORDS}/{name}" for name in names if name.endswith(".json") and name[0] != "."]
            # All at once: there are as many as shards, and each may be a request of its own. `cat` would take brackets
            # in the folder's name for a pattern.
            texts = self.fs.cat_ranges(paths, None, None, on_error="return") if paths else []
            for text in texts:
                if isinstance(text, Exception) and not isinstance(text, FileNotFoundError | IsADirectoryError):
                    raise text
        found = {}
        for text in texts:
            if not isinstance(text, Exception) and (record := _record(text)) is not None:
                found[record.name] = record
        return found

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of what lies in the folder."""
        with readable(self.url):
            return self._sizes(self._root)

    def write_record(self, record: ShardRecord) -> None:
        self.write_text(f"{RECORDS}/{record.name}.json", json.dumps(asdict(record)) + "\n")

    def write_manifest(self, settings: Settings, expected: Sequence[str]) -> Manifest:
        """Sum up the records; written again until no other host has committed a shard in between.

        Raises:
            ValueError: another host has committed shards made with other settings.
        """
        records = self.records()
        while True:
            if others := [name for name, record in records.items() if record.settings not in ("", settings.digest)]:
                raise ValueError(
                    f"{self.url} has shards of two settings: {others[0]} (one of {len(others)}) was made with "
                    f"{records[others[0]].settings}, and here they are {settings.digest}. Give every host the same "
                    "options, and remove the shards of those that had others"
                )
            complete = all(name in records for name in expected)
            manifest = Manifest(settings=settings, shards=list(records.values()), complete=complete)
            self.write_text(MANIFEST, manifest.to_json())
            latest = self.records()
            if latest.keys() == records.keys():
                return manifest
            records = latest

    def write_text(self, name: str, text: str) -> None:
        with self.writing(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path on this machine to write to; on success the file appears in the folder as `name`.

        Raises:
            OSError: the folder takes no file, or the disk is full.
        """
        if not self.remote:
            with _explained(self.url), atomic_file(local_path(self.url) / name) as path:
                yield path
            return
        with _explained(self.url), TemporaryDirectory() as temporary:
            path = Path(temporary) / Path(name).name
            yield path
            with readable(f"{self.url}/{name}", action="written"):
                # Object stores show an upload when it is whole; they have no folders to be made.
                self.fs.makedirs(str(Path(self._root, name).parent), exist_ok=True)
                self.fs.put_file(str(path), f"{self._root}/{name}")

    def clean(self, name: str) -> None:
        """Remove what an interrupted writer of `name` may have left."""
        if not self.remote:
            ours = re.compile(r"\.tmp-[0-9a-f]{8}-" + re.escape(name))
            for entry in local_path(self.url).iterdir():
                if ours.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raises OSError, before hours are spent, where nothing can be written."""
        if self.remote:
            self.write_text(".dalle_torch_write_test", "")
            with readable(self.url):
                self.fs.rm_file(f"{self._root}/.dalle_torch_write_test")
            return
        folder = local_path(self.url)
        with _explained(self.url):
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".tmp-"):
                pass

    def _sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of what lies in a folder, which object stores do not have while it is empty."""
        try:
            return {Path(entry["name"]).name: entry["size"] for entry in self.fs.ls(folder, detail=True)}
        except FileNotFoundError:
            return {}

    def read_text(self, name: str) -> str | None:
        """What a file of the folder holds; None where there is none."""
        with readable(f"{self.url}/{name}"):
            path = f"{self._root}/{name}"
            if not self.fs.exists(path):
                return None
            return bytes(self.fs.cat_file(path)).decode("utf-8", "replace")


def _record(text: bytes) -> ShardRecord | None:
    """The record that `text` is; None for what `encode` cannot have written."""
    try:
        record = ShardRecord(**json.loads(text))
    except (TypeError, ValueError, RecursionError):
        return None
    strings = (record.name, record.source, record.sha256, record.settings)
    numbers = (record.samples, record.bytes, record.source_bytes)
    lists = record.skipped.values() if isinstance(record.skipped, dict) else [None]
    sound = (
        all(isinstance(value, str) for value in strings)
        and all(type(value) is int for value in numbers)
        and all(isinstance(value, list) for value in (record.offsets, *lists))
    )
    return record if sound else None


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Failures to write name the folder; "No space left on device" comes without a name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot write to {url}: {os.strerror(error.errno)}") from error


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "..."


def _line(error: BaseException) -> str:
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())
