"""Pairs of samples that look alike, found without comparing all with all.

Owns: near duplicates by fingerprints of pictures, and by codes. Does not own: the fingerprints (`data.survey`), the
page (`explore_page`).

Both searches cut what is compared into one piece more than places may differ: two near ones have at least one piece in
common (the pigeonhole principle; bands, as locality-sensitive hashing has them, of which none is left to chance).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, NamedTuple

import numpy as np

from dalle_torch.hashing import permutation, splitmix

NEAR_BITS: Final = 3
"""Most bits in which the fingerprints of near duplicates differ, of 64."""
CODES_OF_ONE_DIFFERENT: Final = 8
"""Near duplicates differ in at most one of so many codes: 32 of 256."""
MAX_PAIRS: Final = 1_000_000
"""Pairs that are kept; with more the search ends."""

_WINDOW = 200
"""Samples of one piece that each is compared with: of flat pictures thousands have the same."""
_ROWS_AT_ONCE = 1 << 22
"""Samples whose pieces are sorted together: 100 MB."""
_BLOCK = 1 << 14
"""Rows that are read together."""


def near_fingerprints(fingerprints: Sequence[tuple[int, str]], bits: int = NEAR_BITS) -> Iterator[tuple[str, str, int]]:
    """Pairs whose fingerprints differ in 1 to `bits` bits of 64, with the number of bits; each pair once.

    A piece that thousands have (flat pictures) is looked through for its first 200.
    """
    pieces = bits + 1
    width = 64 // pieces
    told: set[tuple[int, int]] = set()
    for piece in range(pieces):
        groups: dict[int, list[int]] = defaultdict(list)
        for row, (fingerprint, _) in enumerate(fingerprints):
            group = groups[(fingerprint >> (piece * width)) & ((1 << width) - 1)]
            if len(group) < _WINDOW:
                for other in group:
                    distance = (fingerprint ^ fingerprints[other][0]).bit_count()
                    if 0 < distance <= bits and (other, row) not in told:
                        told.add((other, row))
                        yield fingerprints[other][1], fingerprints[row][1], distance
                group.append(row)


class NearPair(NamedTuple):
    """Rows of two samples, the earlier one first, and in how many codes they differ."""

    one: int
    other: int
    codes: int


class CodeRows:
    """Codes of samples on disk, two bytes each, to find those that differ in few places.

    Memory holds nothing of the rows; a search takes a few hundred MB, whatever their number, unless millions of them
    share a piece.

    Args:
        folder: where the file lies while it is needed; it has no name there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: Any = TemporaryFile(dir=folder)  # noqa: SIM115 (`close` ends it)
        self.length = 0
        """Codes of a row; 0 before the first."""
        self.count = 0

    def close(self) -> None:
        self._file.close()

    def add(self, codes: np.ndarray) -> bool:
        """Take one row, int [L]; False for one of another length than the first, or of codes beyond 16 bits."""
        if not len(codes) or int(codes.min()) < 0 or int(codes.max()) >= 1 << 16:
            return False
        self.length = self.length or len(codes)
        if len(codes) != self.length:
            return False
        self._file.write(codes.astype("<u2").tobytes())
        self.count += 1
        return True

    @property
    def most(self) -> int:
        """Codes in which near duplicates differ at the most."""
        return max(1, self.length // CODES_OF_ONE_DIFFERENT) if self.length > 1 else 0

    def near(self, most: int | None = None) -> list[NearPair]:
        """Pairs of rows that differ in 1 to `most` codes, in order; None: `self.most`.

        Of rows with equal pieces each is compared with the 200 after it, so that none is missed unless hundreds share a
        piece. After `MAX_PAIRS` the search ends.
        """
        most = self.most if most is None else most
        if self.count < 2 or not 0 < most < self.length:
            return []
        self._file.flush()
        rows = np.memmap(self._file, dtype="<u2", mode="r", shape=(self.count, self.length))
        # Neighbouring codes are alike, and pieces of neighbours would be those of flat corners.
        pieces = np.array_split(permutation((0xC0DE5,), self.length), most + 1)
        found: dict[tuple[int, int], int] = {}
        parts = -(-self.count // _ROWS_AT_ONCE)
        for piece in pieces:
            for part in range(parts):
                for one, other in _candidates(rows, piece, part, parts):
                    for pair in _compared(rows, one, other, most):
                        found[pair.one, pair.other] = pair.codes
                    if len(found) >= MAX_PAIRS:
                        return _in_order(found)[:MAX_PAIRS]
        return _in_order(found)


def _in_order(found: dict[tuple[int, int], int]) -> list[NearPair]:
    return [NearPair(one, other, codes) for (one, other), codes in sorted(found.items())]


def _candidates(rows: np.ndarray, piece: np.ndarray, part: int, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that have the codes of a piece in common, as two arrays of equal length; of all hashes one part."""
    hashes, places = [], []
    for first in range(0, len(rows), _BLOCK):
        found = np.zeros(len(rows[first : first + _BLOCK]), dtype=np.uint64)
        for column in rows[first : first + _BLOCK][:, piece].T:
            found = splitmix(found ^ column.astype(np.uint64))
        (chosen,) = np.nonzero(found % np.uint64(parts) == part)
        hashes.append(found[chosen])
        places.append(chosen + first)
    values, numbers = np.concatenate(hashes), np.concatenate(places)
    order = np.argsort(values, kind="stable")
    values, numbers = values[order], numbers[order]
    left = np.arange(len(values))
    for offset in range(1, min(_WINDOW, len(values) - 1) + 1):
        # Who has not so many after him of the same piece has none further on.
        left = left[left + offset < len(values)]
        left = left[values[left] == values[left + offset]]
        if not len(left):
            return
        yield numbers[left], numbers[left + offset]


def _compared(rows: np.ndarray, one: np.ndarray, other: np.ndarray, most: int) -> Iterator[NearPair]:
    for first in range(0, len(one), _BLOCK):
        a, b = one[first : first + _BLOCK], other[first : first + _BLOCK]
        codes = (rows[a] != rows[b]).sum(axis=1)
        for place in np.flatnonzero((codes > 0) & (codes <= most)):
            yield NearPair(int(a[place]), int(b[place]), int(codes[place]))
