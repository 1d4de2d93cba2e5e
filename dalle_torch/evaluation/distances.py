"""How far two sets of pictures are apart, by the features that a network sees in them.

Owns: sums over features that do not grow with the number of pictures, the Fréchet distance (FID, arXiv 1706.08500) and
the kernel distance (KID, arXiv 1801.01401). Does not own: the features (`features`, `shapes`).

torchmetrics has both distances. Its FID adds up E[xx'] and subtracts the mean afterwards, in batches as they come, and
its KID keeps all features; here the sums are the same to the last digit whatever the batches, and memory is bounded. A
test holds both to torchmetrics' figures.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dalle_torch.hashing import hashed, permutation

SUBSET = 1000
"""Pictures whose features are kept for the kernel distance: the size of a subset in the paper's own experiments is
1000, and of more pictures a random thousand stands for all."""


class FeatureStatistics:
    """Mean and covariance of features, and a random subset of them; memory does not grow with their number.

    Args:
        dimensions: numbers a picture.
        subset: pictures whose features are kept.
        seed: of the choice of the subset.
    """

    def __init__(self, dimensions: int, *, subset: int = SUBSET, seed: int = 0) -> None:
        if dimensions < 1 or subset < 2:
            raise ValueError(f"dimensions={dimensions} must be at least 1, and subset={subset} at least 2")
        self.dimensions, self.seed = dimensions, seed
        self.count = 0
        self._mean = np.zeros(dimensions)
        self._scatter = np.zeros((dimensions, dimensions))
        self._kept = np.zeros((subset, dimensions), dtype=np.float32)
        self._ranks = np.zeros(subset, dtype=np.uint64)

    def update(self, features: Tensor) -> None:
        """Take further pictures in, [B, dimensions]; picture by picture, so that batches make no difference.

        Raises:
            ValueError: another number of dimensions, or a feature that is not a number; nothing is taken then.
        """
        rows = features.detach().cpu().float().numpy()
        if rows.ndim != 2 or rows.shape[1] != self.dimensions:
            raise ValueError(f"features are {list(rows.shape)}, expected [pictures, {self.dimensions}]")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise ValueError(
                f"{bad} of {len(rows)} pictures have features that are not finite: the feature extractor's weights are "
                "damaged, or its dtype is too narrow; take float32"
            )
        for row in rows:
            self._take(row)

    @property
    def mean(self) -> np.ndarray:
        """float64 [dimensions]."""
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """float64 [dimensions, dimensions], unbiased.

        Raises:
            ValueError: fewer than two pictures.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} pictures have no covariance: at least 2 are needed")
        return self._scatter / (self.count - 1)

    @property
    def kept(self) -> np.ndarray:
        """Features of a random subset, float32 [at most subset, dimensions]; which they are depends on `seed` alone."""
        rows = min(self.count, len(self._kept))
        return self._kept[:rows][np.argsort(self._ranks[:rows], kind="stable")]

    def to_tensors(self) -> dict[str, Tensor]:
        """All that is known, for a file."""
        rows = min(self.count, len(self._kept))
        return {
            "count": torch.tensor([self.count, self.seed, len(self._kept)]),
            "mean": torch.from_numpy(self._mean.copy()),
            "scatter": torch.from_numpy(self._scatter.copy()),
            "kept": torch.from_numpy(self._kept[:rows].copy()),
            "ranks": torch.from_numpy(self._ranks[:rows].view(np.int64).copy()),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FeatureStatistics":
        """The statistics that `to_tensors` gave.

        Raises:
            ValueError: the tensors do not fit each other.
        """
        try:
            count, seed, subset = (int(number) for number in tensors["count"])
            dimensions = len(tensors["mean"])
            statistics = cls(dimensions, subset=subset, seed=seed)
            rows = min(count, subset)
            shapes = {"scatter": [dimensions, dimensions], "kept": [rows, dimensions], "ranks": [rows]}
            if any(list(tensors[name].shape) != shape for name, shape in shapes.items()):
                raise ValueError("shapes of tensors contradict each other")
        except (KeyError, ValueError) as error:
            raise ValueError(f"these are no feature statistics: {error}") from error
        statistics.count = count
        statistics._mean[:] = tensors["mean"].numpy()
        statistics._scatter[:] = tensors["scatter"].numpy()
        statistics._kept[:rows] = tensors["kept"].numpy()
        statistics._ranks[:rows] = tensors["ranks"].numpy().view(np.uint64)
        return statistics

    def _take(self, row: np.ndarray) -> None:
        rank = hashed((self.seed, 0xFEA7), self.count, self.count + 1)[0]
        if self.count < len(self._kept):
            self._kept[self.count], self._ranks[self.count] = row, rank
        else:
            # The pictures of the least random numbers are a random subset, of any prefix of the sequence.
            worst = int(self._ranks.argmax())
            if rank < self._ranks[worst]:
                self._kept[worst], self._ranks[worst] = row, rank
        self.count += 1
        # Welford's update, which loses no digits where features are far from zero.
        offset = row - self._mean
        self._mean += offset / self.count
        self._scatter += np.multiply.outer(offset, row - self._mean)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), 0 for equal statistics.

    With fewer pictures than dimensions the covariances have no full rank: the distance is defined, but biased upwards
    by much; whoever reports it says so (`too_few`).

    Raises:
        ValueError: fewer than two pictures on a side, or other dimensions.
    """
    _check_dimensions(a, b)
    offset = a.mean - b.mean
    first, second = a.covariance, b.covariance
    # tr (C_a C_b)^(1/2) by the symmetric R C_b R with R = C_a^(1/2): same eigenvalues, all real, no rank needed.
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    # Rounding may leave equal sets a little below zero.
    return max(0.0, float(offset @ offset + np.trace(first) + np.trace(second) - 2 * cross))


def too_few(statistics: FeatureStatistics) -> str | None:
    """Why a Fréchet distance of so few pictures should not be compared with others; None where it may."""
    if statistics.count > statistics.dimensions:
        return None
    return (
        f"{statistics.count:,} pictures for {statistics.dimensions:,} features: the covariance has no full rank and "
        f"the Fréchet distance is too high; take more than {statistics.dimensions:,}"
    )


def kernel_distance(
    a: FeatureStatistics, b: FeatureStatistics, *, subsets: int = 100, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under (x'y / D + 1)^3: the mean over random subsets, and their deviation.

    Unbiased, so around zero for equal distributions, where it may be a little negative.

    Args:
        subset_size: pictures of each side in a subset; fewer where fewer are kept.

    Raises:
        ValueError: fewer than two pictures on a side, or other dimensions.
    """
    _check_dimensions(a, b)
    first, second = a.kept.astype(np.float64), b.kept.astype(np.float64)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f"{min(len(first), len(second))} pictures have no kernel distance: at least 2 are needed")
    found = []
    for number in range(subsets):
        x = first[permutation((seed, number, 0), len(first))[:size]]
        y = second[permutation((seed, number, 1), len(second))[:size]]
        found.append(_discrepancy(x, y))
    return float(np.mean(found)), float(np.std(found))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    n, dimensions = x.shape

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left @ right.T / dimensions + 1) ** 3

    def among(kernels: np.ndarray) -> float:
        return (kernels.sum() - np.trace(kernels)) / (n * (n - 1))

    return among(kernel(x, x)) + among(kernel(y, y)) - 2 * kernel(x, y).mean()


def _check_dimensions(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.dimensions != b.dimensions:
        raise ValueError(
            f"features of {a.dimensions} and {b.dimensions} numbers cannot be compared: take one extractor for both"
        )
