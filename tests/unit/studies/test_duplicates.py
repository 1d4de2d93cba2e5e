"""Near duplicates against comparing all with all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.studies import duplicates
from dalle_torch.studies.duplicates import CodeRows, NearPair, near_fingerprints


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.lists(st.integers(0, 63), max_size=3, unique=True)
)
def test_every_near_fingerprint_is_found_and_no_other(values, flipped):
    changed = values[0]
    for bit in flipped:
        changed ^= 1 << bit
    named = [(value, str(row)) for row, value in enumerate([*values, changed])]
    expected = {
        (a[1], b[1]): (a[0] ^ b[0]).bit_count()
        for i, a in enumerate(named)
        for b in named[i + 1 :]
        if 0 < (a[0] ^ b[0]).bit_count() <= 3
    }
    assert {(one, other): bits for one, other, bits in near_fingerprints(named)} == expected


def by_comparing_all(rows, most):
    apart = (rows[:, None] != rows[None]).sum(axis=-1)
    return [
        NearPair(one, other, int(apart[one, other]))
        for one in range(len(rows))
        for other in range(one + 1, len(rows))
        if 0 < apart[one, other] <= most
    ]


def found_in(rows, most=None):
    kept = CodeRows()
    try:
        assert all(kept.add(row) for row in rows)
        return kept.near(most), kept.most
    finally:
        kept.close()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(0, 60), length=st.integers(1, 40), codes=st.integers(2, 30),
    kinds=st.integers(1, 4), changed=st.integers(0, 12),
)  # fmt: skip
def test_every_near_pair_of_codes_is_found_and_no_other(seed, count, length, codes, kinds, changed):
    """Rows around a few that they differ from in a few places, flat ones among them, in one or several parts."""
    random = np.random.default_rng(seed)
    centres = random.integers(0, codes, (kinds, length))
    centres[0] = 0
    rows = centres[random.integers(0, kinds, count)].copy()
    for row in rows:
        row[random.integers(0, length, random.integers(0, changed + 1))] = random.integers(0, codes)
    found, most = found_in(rows)
    assert found == (by_comparing_all(rows, most) if count else [])


@pytest.mark.parametrize("at_once", [7, 64])
def test_parts_and_blocks_make_no_difference(monkeypatch, at_once):
    random = np.random.default_rng(1)
    rows = random.integers(0, 50, (5, 32))[random.integers(0, 5, 90)]
    rows[np.arange(90), random.integers(0, 32, 90)] += 1
    whole, _ = found_in(rows, most=3)
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(duplicates, "_BLOCK", at_once)
    assert found_in(rows, most=3)[0] == whole == by_comparing_all(rows, 3) != []


def test_what_thousands_share_is_not_compared_all_with_all(monkeypatch):
    """Each is compared with those in its window, in every piece: the number of comparisons is bounded."""
    monkeypatch.setattr(duplicates, "_WINDOW", 5)
    compared = []
    candidates = duplicates._candidates

    def counted(*words):
        for one, other in candidates(*words):
            compared.append(len(one))
            yield one, other

    monkeypatch.setattr(duplicates, "_candidates", counted)
    rows = np.zeros((2000, 16), dtype=np.int64)
    rows[np.arange(2000), np.arange(2000) % 16] = np.arange(2000)
    found, most = found_in(rows)
    assert most == 2 and 2000 < sum(compared) <= 5 * 2000 * 3
    assert 5 * 1900 < len(found) <= sum(compared)


def test_the_search_ends_where_pairs_have_no_end(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 10)
    rows = np.eye(40, dtype=np.int64)
    assert len(found_in(rows)[0]) == 10


def test_rows_of_other_lengths_and_of_codes_that_are_none_are_left_out():
    rows = CodeRows()
    assert rows.add(np.arange(16)) and not rows.add(np.arange(15)) and not rows.add(np.arange(16) + (1 << 16))
    assert not rows.add(np.arange(16) - 1) and rows.count == 1 and rows.near() == []
    rows.close()
