"""Names of slices, and what a chip's devices have of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.studies.pod_plan.chips import CHIPS, GIB, find_topology


@pytest.mark.parametrize(
    ("name", "of_libtpu", "devices"),
    [
        ("v2-8", "v2:2x2", 8),
        ("v3-8", "v3:2x2", 8),
        ("v3-32", "v3:4x4", 32),
        ("v3-256", "v3:8x16", 256),
        ("v3-2048", "v3:32x32", 2048),
        ("v4-8", "v4:2x2x1", 8),
        ("v4-32", "v4:2x2x4", 32),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-4", "v5e:2x2", 4),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v3:4x8", "v3:4x8", 64),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
    ],
)
def test_a_slice_is_known_by_its_name(name: str, of_libtpu: str, devices: int) -> None:
    topology = find_topology(name)
    assert (topology.of_libtpu, topology.devices) == (of_libtpu, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "unknown.*v2, v3, v4, v5e, v5p, v6e"),
        ("256", "unknown"),
        ("v3-", "unknown"),
        ("v3-12", "power of two.*v3:4x4"),
        ("v3-1", "named by cores"),
        ("v6e-12", "named by chips"),
        ("v3-4096", "2048 chips, and a pod of v3 1024"),
        ("v3:2x2x2", "2 dimensions"),
        ("v4:2x0x2", "3 dimensions"),
    ],
)
def test_what_cannot_be_rented_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_topology(name)


@given(st.sampled_from(sorted(CHIPS)), st.integers(min_value=0, max_value=8))
def test_a_named_slice_has_its_chips_in_a_near_cube(kind: str, exponent: int) -> None:
    chip = CHIPS[kind]
    chips = 2**exponent
    if chips > chip.largest:
        return
    shape = find_topology(f"{kind}-{chips * chip.counted}").chips
    assert math.prod(shape) == chips and len(shape) == chip.dimensions
    assert max(shape) <= 2 * min(shape)


def test_a_core_has_its_share_of_the_chip() -> None:
    v3 = CHIPS["v3"]
    assert v3.core_memory == 16 * GIB
    assert v3.core_flops == 61.5e12
    assert v3.core_memory_rate == 450e9
