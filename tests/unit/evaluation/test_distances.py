"""FID and KID against computations of another kind, and what makes them repeatable."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_torch.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, too_few

D = 12


def features(seed, count, shift=0.0, dimensions=D):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(1))
    return (torch.randn(count, dimensions, generator=generator) @ mixing).relu() + shift


def statistics(rows, subset=1000, seed=0):
    found = FeatureStatistics(rows.shape[1], subset=subset, seed=seed)
    found.update(rows)
    return found


def plain_frechet(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of a root is the sum of the roots of the eigenvalues, of the product as it stands.
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * roots.sum().real)


@pytest.mark.parametrize("shift", [0.0, 0.3, 100.0])
def test_fid_is_that_of_the_formula_in_float64(shift):
    a, b = features(0, 400, shift), features(2, 300, shift + 0.1)
    # Eigenvalues of a product that is not symmetric are good to about 1e-9 of the traces.
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(plain_frechet(a, b), rel=1e-7)


def test_mean_and_covariance_are_numpys_even_far_from_zero():
    rows = features(0, 200) + 1e4
    found = statistics(rows)
    # float32 features around 1e4 have a spacing of 1e-3; the sums add nothing to that.
    np.testing.assert_allclose(found.mean, rows.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_kid_is_that_of_the_formula():
    a, b = features(0, 40), features(2, 40, 0.2)
    x, y = a.double().numpy(), b.double().numpy()
    total = 0.0
    for i in range(40):
        for j in range(40):
            if i != j:
                total += ((x[i] @ x[j] / D + 1) ** 3 + (y[i] @ y[j] / D + 1) ** 3) / (40 * 39)
            total -= 2 * (x[i] @ y[j] / D + 1) ** 3 / 1600
    # Subsets of all pictures are all pictures, in another order.
    mean, deviation = kernel_distance(statistics(a), statistics(b), subsets=3, subset_size=40)
    assert mean == pytest.approx(total, rel=1e-10) and deviation < 1e-9


def test_both_are_torchmetrics_figures():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Mean(torch.nn.Module):
        """Features of pictures: block means."""

        def forward(self, pixels):
            return torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, (2, 2)).flatten(1)

    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, high, (50, 3, 32, 32), dtype=torch.uint8, generator=generator) for high in (256, 200)]
    fid = FrechetInceptionDistance(Mean(), input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Mean(), subsets=1, subset_size=50)
    for pictures, real in zip(sets, (True, False), strict=True):
        fid.update(pictures, real=real)
        kid.update(pictures, real=real)
    a, b = (statistics(Mean()(pictures)) for pictures in sets)
    # theirs subtracts the mean at the end, and takes complex roots
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert kernel_distance(a, b, subsets=1, subset_size=50)[0] == pytest.approx(float(kid.compute()[0]), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=5, unique=True), seed=st.integers(0, 3))
def test_batches_make_no_difference_to_the_last_digit(cuts, seed):
    rows = features(3, 60)
    whole = statistics(rows, subset=20, seed=seed)
    parts = FeatureStatistics(D, subset=20, seed=seed)
    bounds = [0, *sorted(cuts), 60]
    for low, high in pairwise(bounds):
        parts.update(rows[low:high])
    assert (whole.mean == parts.mean).all() and (whole.covariance == parts.covariance).all()
    assert (whole.kept == parts.kept).all()


def test_the_kept_subset_is_a_random_one_of_all():
    rows = torch.arange(4000.0)[:, None]
    kept = [FeatureStatistics(1, subset=100, seed=seed) for seed in (0, 1)]
    for found in kept:
        found.update(rows)
    first, second = (set(found.kept[:, 0].tolist()) for found in kept)
    assert len(first) == len(second) == 100 and first != second
    # A mean of 100 out of 0 to 3999 has a deviation of 115.
    assert abs(np.mean(list(first)) - 2000) < 600


def test_equal_sets_have_no_distance_and_worse_pictures_more():
    a = features(0, 500)
    distances = [
        frechet_distance(statistics(a), statistics(a + noise * features(9, 500))) for noise in (0, 0.1, 0.5, 1)
    ]
    assert distances[0] < 1e-9 and distances == sorted(distances)
    assert (
        abs(kernel_distance(statistics(a), statistics(features(5, 500)))[0])
        < 0.05 * kernel_distance(statistics(a), statistics(a + 1))[0]
    )


def test_fewer_pictures_than_dimensions_have_a_distance_that_is_said_to_be_biased():
    few = statistics(features(0, 5))
    assert np.isfinite(frechet_distance(few, statistics(features(1, 500))))
    assert "5 pictures for 12 features" in too_few(few)
    assert too_few(statistics(features(0, 13))) is None


def test_statistics_come_back_from_tensors_and_go_on():
    rows = features(0, 50)
    whole = statistics(rows, subset=20)
    half = FeatureStatistics.from_tensors(statistics(rows[:30], subset=20).to_tensors())
    half.update(rows[30:])
    assert (half.covariance == whole.covariance).all() and (half.kept == whole.kept).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [({"mean": None}, "no feature statistics"), ({"kept": torch.zeros(3, D)}, "contradict")],
)
def test_damaged_tensors_are_refused(damage, message):
    tensors = statistics(features(0, 30), subset=20).to_tensors() | damage
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_what_has_no_figure_is_refused():
    found = statistics(features(0, 3))
    with pytest.raises(ValueError, match="2 of 3 pictures have features that are not finite"):
        found.update(torch.tensor([[float("nan")] * D, [float("inf")] * D, [0.0] * D]))
    assert found.count == 3
    with pytest.raises(ValueError, match=r"features are \[3, 4\], expected \[pictures, 12\]"):
        found.update(torch.zeros(3, 4))
    one = statistics(features(0, 1))
    with pytest.raises(ValueError, match="1 pictures have no covariance: at least 2"):
        frechet_distance(one, found)
    with pytest.raises(ValueError, match="1 pictures have no kernel distance"):
        kernel_distance(one, found)
    with pytest.raises(ValueError, match="12 and 3 numbers cannot be compared"):
        frechet_distance(found, FeatureStatistics(3))
    with pytest.raises(ValueError, match="subset=1"):
        FeatureStatistics(3, subset=1)
