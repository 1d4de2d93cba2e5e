"""How much of a picture a VQGAN keeps.

Owns: errors between pictures and their reconstructions, use of the codebook. Does not own: the VQGAN (`models.vqgan`).
"""

import math
from typing import Any

import torch
from torch import Tensor

PEAK = 255.0
"""Largest value of a pixel; errors are on this scale."""


class ReconstructionStatistics:
    """Sums over pairs of pictures; memory does not grow with their number.

    Args:
        codes: entries of the codebook.
    """

    def __init__(self, codes: int) -> None:
        self.count = 0
        self._squared_error = 0.0
        self._peak_ratio = 0.0
        self._similarity = 0.0
        self._used = torch.zeros(codes, dtype=torch.int64)

    def update(self, originals: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Take pairs in.

        Args:
            originals, reconstructions: uint8 [B, 3, H, W].
            codes: of the originals, int64 [B, L].

        Raises:
            ImportError: torchmetrics is not installed; says how to.
            ValueError: shapes or types do not fit.
        """
        if originals.dtype != torch.uint8 or originals.shape != reconstructions.shape or originals.ndim != 4:
            raise ValueError(
                f"pictures are {originals.dtype} {list(originals.shape)} and {list(reconstructions.shape)}, expected "
                "two of uint8 [B, 3, H, W]"
            )
        similarity = _structural_similarity()
        for original, reconstruction in zip(originals.double(), reconstructions.double(), strict=True):
            error = float(((original - reconstruction) ** 2).mean())
            self._squared_error += error
            # A picture without any error has no finite ratio: half a step of rounding stands for it.
            self._peak_ratio += 10 * math.log10(PEAK**2 / max(error, 0.25 / original.numel()))
            self._similarity += float(similarity(reconstruction[None], original[None], data_range=PEAK))
        self.count_codes(codes)
        self.count += len(originals)

    def count_codes(self, codes: Tensor) -> None:
        """Take in codes whose pictures are not known, int64 [B, L]: they count for the use of the codebook alone."""
        self._used += torch.bincount(codes.flatten().cpu(), minlength=len(self._used))

    def result(self) -> dict[str, Any]:
        """Means over pictures.

        Returns:
            mse on the scale 0 to 255; psnr in decibels; ssim (Wang et al. 2004, 11 x 11 Gaussian window of 1.5);
            codebook_used, the share of entries that occur; codebook_perplexity, exp of the entropy of their use.

        Raises:
            ValueError: nothing was taken in.
        """
        if not self.count:
            raise ValueError("no pictures were reconstructed")
        return {
            "pictures": self.count,
            "mse": self._squared_error / self.count,
            "psnr": self._peak_ratio / self.count,
            "ssim": self._similarity / self.count,
        } | self.codebook()

    def codebook(self) -> dict[str, float]:
        """`codebook_used` and `codebook_perplexity` alone, which need no pictures."""
        if not self._used.any():
            raise ValueError("no codes were taken in")
        share = self._used.double() / self._used.sum()
        entropy = -float((share[share > 0] * share[share > 0].log()).sum())
        return {
            "codebook_used": float((self._used > 0).double().mean()),
            "codebook_perplexity": math.exp(entropy),
        }


def _structural_similarity() -> Any:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("SSIM needs torchmetrics: pip install 'dalle-torch[eval]'") from error
    return structural_similarity_index_measure
