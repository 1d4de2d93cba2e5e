"""Inverse p-th roots of batches of positive semi-definite matrices, by eigenvalues or by coupled Newton iteration.

Shapes: N matrices of one size and one p, float32 [N, d, d].
Owns: the ridge, both methods, which roots failed. Does not own: when roots are taken and kept (`preconditioner`).
Source: Anil et al., arXiv 2002.09018; Higham, "Functions of Matrices", equation 7.18.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dalle_torch import products

Method = Literal["newton", "eigh"]

LEAST_EIGENVALUE = 1e-6
"""The ridge is relative to the largest eigenvalue, but to no less than this."""
DOUBLE_UP_TO = 64
"""Eigenvalues of matrices up to this size are taken in float64, where that costs next to nothing."""
ROUNDS = 100
TOLERANCE = 1e-6
GROWTH = 1.2
"""An iteration whose error grows by more than this is over, and the step before it counts."""


@dataclass(frozen=True, kw_only=True)
class RootProblem:
    """What all matrices of a batch share.

    Attributes:
        p: the root is matrix^(-1/p).
        epsilon: the ridge, relative to the largest eigenvalue.
        threshold: a root whose error is not below this failed; of Newton's error, eigenvalues have none.
        padded_size: the matrices count as if filled up to this size with an identity. The largest eigenvalue that the
            ridge is relative to, and where Newton starts and stops, are then those of the filled matrix.
        static: always the same operations, whatever the values: for devices that the host should not wait for.
    """

    p: int
    epsilon: float
    threshold: float
    padded_size: int
    static: bool = False


def inverse_roots(matrices: Tensor, problem: RootProblem, method: Method) -> tuple[Tensor, Tensor]:
    """Roots, float32 [N, d, d], and which of them failed, bool [N]; a failed root's values are arbitrary but finite.

    A matrix with a NaN or an infinity fails; it does no harm to the others.
    """
    finite = _finite(matrices)
    safe = _or_eye(matrices, finite, problem)
    roots, failed = (_by_eigenvalues if method == "eigh" else _by_newton)(safe, problem)
    failed = failed | ~finite | ~_finite(roots)
    return _or_eye(roots, ~failed, problem), failed


def _or_eye(matrices: Tensor, fine: Tensor, problem: RootProblem) -> Tensor:
    """The matrices, an identity in place of each that is not fine."""
    if not problem.static and bool(fine.all()):
        return matrices
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(fine.view(-1, 1, 1), matrices, eye)


def _finite(matrices: Tensor) -> Tensor:
    # A sum is as good as a look at each, and what a sum of floats does is in every compiler.
    return matrices.sum((1, 2)).isfinite()


def _by_eigenvalues(matrices: Tensor, problem: RootProblem) -> tuple[Tensor, Tensor]:
    if matrices.shape[-1] <= DOUBLE_UP_TO:
        values, vectors, failed = _eigh(matrices.double())
    else:
        _, vectors, failed = _eigh(matrices)
        # LAPACK leaves them by columns, which no operation below likes.
        vectors = vectors.contiguous()
        # What LAPACK finds is wrong by some roundings of the largest eigenvalue, which is a good part of the ridge; the
        # eigenvectors' own quotients are right to a fifth of that, for a fifth of the time that float64 takes on top.
        values = (_product(matrices, vectors.mT) * vectors).sum(1)
    # Rounding makes the smallest eigenvalues of what is never negative a little negative.
    values = values.clamp_min(0)
    largest = values[:, -1:]
    if _is_filled(matrices, problem):
        largest = largest.clamp_min(1.0)
    powers = (values + problem.epsilon * largest.clamp_min(LEAST_EIGENVALUE)) ** (-1 / problem.p)
    return _product(vectors * powers.unsqueeze(1), vectors).to(matrices.dtype), failed


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, d, d] times the transpose of each b [N, d, d]."""
    if not products.pays(a, a.shape[-1] ** 3):
        return a @ b.mT
    result = torch.empty_like(a)
    for target, left, right in zip(result, a, b, strict=True):
        target.copy_(products.product(left, right))
    return result


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending eigenvalues [N, d], eigenvectors in columns, and for which matrices LAPACK found none."""
    failed = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    try:
        # The same triangle of the same matrix; LAPACK reads by columns, so nothing has to be transposed for it.
        transposed = matrices.device.type == "cpu"
        values, vectors = torch.linalg.eigh(matrices.mT, "U") if transposed else torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        if len(matrices) == 1:
            eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
            return torch.ones_like(eye[:1]), eye.unsqueeze(0), ~failed
        # One matrix's failure is an error of the whole batch: each gets a try of its own.
        parts = [_eigh(matrix) for matrix in matrices.split(1)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]
    return values, vectors, failed


def _by_newton(matrices: Tensor, problem: RootProblem) -> tuple[Tensor, Tensor]:
    largest = _squared_power_iteration(matrices) if problem.static else _power_iteration(matrices, problem)
    if problem.static and _is_filled(matrices, problem):
        largest = largest.clamp_min(1.0)
    ridge = problem.epsilon * largest.clamp_min(LEAST_EIGENVALUE)
    if matrices.shape[-1] == 1:
        roots = (matrices + ridge.view(-1, 1, 1)) ** (-1 / problem.p)
        return roots, torch.zeros_like(ridge, dtype=torch.bool)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    damped = matrices + ridge.view(-1, 1, 1) * eye
    roots, error = _coupled_newton(damped, 1 + ridge, problem)
    return roots, ~(error < problem.threshold)


def _coupled_newton(matrices: Tensor, filling: Tensor, problem: RootProblem) -> tuple[Tensor, Tensor]:
    """Roots [N, d, d] and their errors [N]; `filling` [N] is the value on the diagonal of what is filled up.

    The filled part stays diagonal throughout, so one number stands for it.
    """
    p, alpha = problem.p, -1 / problem.p
    fill = problem.padded_size - matrices.shape[-1]
    norm = (matrices.square().sum((1, 2)) + fill * filling.square()).sqrt()
    z = (1 + p) / (2 * norm)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    m, m_fill = matrices * z.view(-1, 1, 1), filling * z
    h = eye * (z ** (1 / p)).view(-1, 1, 1)
    error = _error(m, m_fill, eye, fill)
    active = error > TOLERANCE
    for _ in range(_static_rounds(problem) if problem.static else ROUNDS):
        if not problem.static and not bool(active.any()):
            break
        factor, factor_fill = (1 - alpha) * eye + alpha * m, (1 - alpha) + alpha * m_fill
        new_m, new_fill = _power(factor, p) @ m, factor_fill**p * m_fill
        new_error = _error(new_m, new_fill, eye, fill)
        shrinks = new_error < error * GROWTH
        # The root of the last step that did not make it worse; the error is that of the last step made.
        h = torch.where((active & shrinks).view(-1, 1, 1), h @ factor, h)
        m, m_fill = torch.where(active.view(-1, 1, 1), new_m, m), torch.where(active, new_fill, m_fill)
        error = torch.where(active, new_error, error)
        active = active & shrinks & (new_error > TOLERANCE)
    return h, error


def _error(m: Tensor, m_fill: Tensor, eye: Tensor, fill: int) -> Tensor:
    error = (m - eye).abs().amax((1, 2))
    # A NaN has to come through, as it does through `maximum`.
    return torch.maximum(error, (m_fill - 1).abs()) if fill > 0 else error


def _power(matrices: Tensor, p: int) -> Tensor:
    """matrices^p by repeated squaring."""
    result: Tensor | None = None
    while True:
        if p & 1:
            result = matrices if result is None else result @ matrices
        p >>= 1
        if not p:
            assert result is not None
            return result
        matrices = matrices @ matrices


def _power_iteration(matrices: Tensor, problem: RootProblem) -> Tensor:
    """The largest eigenvalue of each filled matrix, [N], as far as `ROUNDS` rounds find it."""
    size, device = matrices.shape[-1], matrices.device
    start = _start_vector(problem.padded_size)
    v = _on(start[:size], device).expand(len(matrices), size)
    v_fill = torch.full((len(matrices),), float(np.linalg.norm(start[size:])), device=device)
    value = torch.zeros(len(matrices), device=device)
    active = torch.ones(len(matrices), dtype=torch.bool, device=device)
    for _ in range(ROUNDS):
        norm = (v.square().sum(1) + v_fill.square()).sqrt()
        v, v_fill = v / norm.unsqueeze(1), v_fill / norm
        product = (matrices @ v.unsqueeze(2)).squeeze(2)
        new = (v * product).sum(1) + v_fill.square()
        moved = (new - value).abs() > TOLERANCE
        value = torch.where(active, new, value)
        active = active & moved
        v = product
        if not bool(active.any()):
            break
    return value


def _squared_power_iteration(matrices: Tensor) -> Tensor:
    """The largest eigenvalue of each matrix, [N], from seven squarings: 128 rounds in a fixed number of operations."""
    power = matrices
    for _ in range(7):
        norm = power.square().sum((1, 2), keepdim=True).sqrt()
        power = power / torch.where(norm > 0, norm, 1.0)
        power = power @ power
    start = _on(_start_vector(matrices.shape[-1]), matrices.device)
    v = power @ start.view(1, -1, 1)
    square = v.square().sum((1, 2))
    return (v * (matrices @ v)).sum((1, 2)) / torch.where(square > 0, square, 1.0)


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    # Otherwise the host waits until all that was asked of the device before is done.
    return torch.from_numpy(values.copy()).to(device, non_blocking=True)


@functools.cache
def _start_vector(size: int) -> np.ndarray:
    return np.random.RandomState(1729).uniform(-1, 1, size).astype(np.float32)


def _static_rounds(problem: RootProblem) -> int:
    """Rounds in which Newton converges whatever the matrix, as long as float32 lets it.

    The smallest eigenvalue of M is at least epsilon / size of the largest, and far from 1 each round makes it
    (1 + 1/p)^p times as large; from there on a few rounds double the correct digits.
    """
    growth = problem.p * math.log1p(1 / problem.p)
    distance = math.log(2 * math.sqrt(problem.padded_size) / max(problem.epsilon, 1e-9))
    return min(ROUNDS, math.ceil(distance / growth) + 7)


def _is_filled(matrices: Tensor, problem: RootProblem) -> bool:
    return problem.padded_size > matrices.shape[-1]
