"""Settings, and which of them no other one beats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.studies.drawings import Setting
from dalle_torch.studies.pareto import front, settings_of


def test_the_front_is_what_nothing_beats():
    points = [(10.0, 0.2), (8.0, 0.3), (9.0, 0.5), (12.0, 0.5), (20.0, 0.9), (8.0, 0.3)]
    assert front(points) == [False, True, True, False, True, True]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_every_point_off_the_front_is_beaten_by_one_on_it(points):
    best = [point for point, kept in zip(points, front(points), strict=True) if kept]
    assert best
    for point, kept in zip(points, front(points), strict=True):
        beaten = any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in best)
        assert beaten != kept


def test_settings_are_all_combinations_once():
    found = settings_of([1, 2, 1], [0.5, 1.0], [None, 8])
    assert len(found) == 8
    assert found[0] == Setting(condition_scale=1, temperature=0.5) and found[-1].top_k == 8
    assert str(found[-1]) == "scale 2, temperature 1, top-k 8"
    with pytest.raises(ValueError, match="temperature"):
        settings_of([1], [-1], [None])
