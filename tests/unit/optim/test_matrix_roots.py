"""Roots are roots, both methods agree, and a matrix without one says so and leaves the others alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dalle_torch.optim.shampoo import matrix_roots
from dalle_torch.optim.shampoo.matrix_roots import RootProblem, inverse_roots

METHODS = ("newton", "eigh")


def problem(size: int, p: int = 4, **changes: float) -> RootProblem:
    return RootProblem(**{"p": p, "epsilon": 1e-6, "threshold": 0.1, "padded_size": size} | changes)


def moments(count: int, size: int, rank: int, seed: int = 0) -> Tensor:
    """Second moments of random rows, float32 [count, size, size]."""
    rows = torch.randn(count, size, rank, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.mT


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_the_pth_power_of_a_root_is_the_inverse(p: int, method: str, static: bool) -> None:
    matrices = moments(3, 12, 40)
    roots, failed = inverse_roots(matrices, problem(12, p, static=static), method)
    assert not failed.any()
    # The condition number is about 20, times float32's rounding and p products.
    product = torch.linalg.matrix_power(roots.double(), p) @ matrices.double()
    torch.testing.assert_close(product, torch.eye(12).double().expand(3, 12, 12), atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 30), st.sampled_from([2, 4, 6]), st.integers(0, 1000), st.booleans())
def test_both_methods_agree_also_on_singular_matrices(size: int, rank: int, p: int, seed: int, filled: bool) -> None:
    matrices = moments(2, size, rank, seed)
    wanted = problem(size + 3 if filled else size, p, epsilon=1e-4)
    newton, newton_failed = inverse_roots(matrices, wanted, "newton")
    eigh, eigh_failed = inverse_roots(matrices, wanted, "eigh")
    same = problem(size + 3 if filled else size, p, epsilon=1e-4, static=True)
    static, static_failed = inverse_roots(matrices, same, "newton")
    assert not eigh_failed.any()
    # Of 26,000 such batches Newton's iteration loses its way in 90, as the original's does; those roots are not used.
    used = ~(newton_failed | static_failed)
    newton, static, eigh = newton[used], static[used], eigh[used]
    # Where nothing was seen the root is of the ridge, which rounding of size * 6e-8 reaches: 1e-2 of 1e-4 at size 20.
    # The power iteration of the original may stop a few percent early; a 1/p-th of that comes through.
    assert (newton - eigh).norm() <= 3e-2 * eigh.norm()
    assert (static - eigh).norm() <= 3e-2 * eigh.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_its_matrices_give_alone(method: str) -> None:
    matrices = torch.cat([moments(2, 10, 30), moments(2, 10, 2) * 1e-5, torch.zeros(1, 10, 10)])
    together, failed = inverse_roots(matrices, problem(10), method)
    for matrix, root, bad in zip(matrices, together, failed, strict=True):
        (alone,), alone_failed = inverse_roots(matrix.unsqueeze(0), problem(10), method)
        assert bool(bad) == bool(alone_failed)
        # Batched products may add in another order.
        torch.testing.assert_close(root, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_fails_alone(method: str, bad: float, static: bool) -> None:
    matrices = moments(3, 6, 20)
    good, _ = inverse_roots(matrices, problem(6, static=static), method)
    matrices[1, 2, 3] = bad
    roots, failed = inverse_roots(matrices, problem(6, static=static), method)
    assert failed.tolist() == [False, True, False]
    assert roots.isfinite().all()
    torch.testing.assert_close(roots[::2], good[::2])


@pytest.mark.parametrize("rank", [40, 400])
def test_eigenvalues_of_large_matrices_are_as_in_float64(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = moments(2, 100, rank)
    single, _ = inverse_roots(matrices, problem(100, 2), "eigh")
    monkeypatch.setattr(matrix_roots, "DOUBLE_UP_TO", 100)
    double, _ = inverse_roots(matrices, problem(100, 2), "eigh")
    # Where nothing was seen the root is of the ridge, 1e-6 of the largest eigenvalue, and rounding is a few percent of
    # that; half a percent comes through a square root.
    assert (single - double).norm() <= 1e-2 * double.norm()


def test_newton_fails_above_the_threshold() -> None:
    matrices = moments(2, 16, 3)
    _, failed = inverse_roots(matrices, problem(16, 4, epsilon=1e-12), "newton")
    assert failed.all()
    _, failed = inverse_roots(matrices, problem(16, 4, threshold=1e-9), "newton")
    assert failed.all()


def test_a_matrix_whose_eigenvalues_are_not_found_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = moments(3, 6, 20)
    good, _ = inverse_roots(matrices, problem(6), "eigh")
    eigh = torch.linalg.eigh

    def fragile(batch: Tensor, *triangle: str) -> tuple[Tensor, Tensor]:
        if any(torch.allclose(matrix.float(), matrices[1]) for matrix in batch):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(batch, *triangle)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    roots, failed = inverse_roots(matrices, problem(6), "eigh")
    assert failed.tolist() == [False, True, False]
    torch.testing.assert_close(roots[::2], good[::2])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_filling_up_is_as_if_there_were_an_identity(method: str, static: bool) -> None:
    small = moments(2, 5, 3) * 1e-4
    filled = torch.eye(9).repeat(2, 1, 1)
    filled[:, :5, :5] = small
    expected, _ = inverse_roots(filled, problem(9, static=static), method)
    roots, _ = inverse_roots(small, problem(9, static=static), method)
    plain, _ = inverse_roots(small, problem(5, static=static), method)
    # The ridge, 1e-6 of an eigenvalue of 1, is far above the rounding of entries of 1e-4.
    torch.testing.assert_close(roots, expected[:, :5, :5], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert (plain - roots).norm() > 0.1 * roots.norm()


def test_static_rounds_suffice_for_the_worst_matrix() -> None:
    for size, p in ((4, 2), (64, 4), (64, 8)):
        spread = torch.logspace(0, -9, size).diag().unsqueeze(0)
        _, failed = inverse_roots(spread, problem(size, p, static=True, threshold=1e-2), "newton")
        assert not failed, (size, p)
        assert matrix_roots._static_rounds(problem(size, p)) < 60


@pytest.mark.parametrize("method", METHODS)
def test_tiny_statistics_keep_a_ridge(method: str) -> None:
    roots, failed = inverse_roots(torch.zeros(1, 4, 4), problem(4), method)
    assert not failed
    # (1e-6 * 1e-6)^(-1/4)
    torch.testing.assert_close(roots[0], 1e3 * torch.eye(4), rtol=1e-3, atol=1e-3)
