"""Training on meshes of eight virtual devices: the same five updates as on one device, by every way of computing them.

The variants and what they are measured by are those of `benchmarks/training_equality.py`, which runs all of them.
"""

import pytest

from benchmarks.training_equality import STEPS, compare

pytestmark = pytest.mark.xla

NAMES = ["8x1", "2x4", "4x2, accumulation 3, scan, checkpointing", "4x2, adamw", "4x2, adafactor"]


@pytest.fixture(scope="module")
def seen() -> dict[str, dict]:
    return compare(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_updates_are_those_of_one_device(seen: dict[str, dict], name: str) -> None:
    found = seen[name]
    assert not any(found["layout"]), found["layout"]
    # Sums in another order; norms of later gradients have the parameters' difference in them too.
    assert found["losses_difference"] <= 1e-5, found
    assert found["norms_difference"] <= 1e-3, found
    assert found["parameters_difference"] <= 1e-3, found["worst_parameter"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_after_both_kinds_of_updates_were_seen(seen: dict[str, dict], name: str) -> None:
    compilations = seen[name]["compilations"]
    assert len(compilations) == STEPS and compilations[0] > 0
    # The first update takes roots, the second does not; the fourth takes them again.
    assert compilations[2:] == [0] * (STEPS - 2), compilations
