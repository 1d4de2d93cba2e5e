"""3 x 3 convolutions on a CPU by Winograd's minimal filtering F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308).

Owns: the transforms, kernels in transformed form, a strip of a map through one convolution. Does not own: whose
weights they are, when it pays (`vqgan_fast`).
A tile of 4 x 4 outputs costs 36 products for each pair of channels, instead of 144. The points 0, +-sqrt(1/2),
+-sqrt(2) and infinity keep the rounding error near that of a plain convolution; the usual 0, +-1, +-2 make it six times
that.

Maps are [H, W, C], contiguous, float32; C channels in, O out.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 4
"""Outputs of a tile's side."""
TAPS = 3
WINDOW = TILE + TAPS - 1
"""Inputs of a tile's side."""


class Transforms(NamedTuple):
    """For one side, float64; both sides take the same one after the other."""

    inputs: Tensor
    """[6, 6]"""
    kernels: Tensor
    """[6, 3]"""
    outputs: Tensor
    """[4, 6]"""


@lru_cache(maxsize=1)
def transforms() -> Transforms:
    """The Cook-Toom construction, each row of the input transform scaled to a largest entry of 1."""
    points = torch.tensor([0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)], dtype=torch.float64, device="cpu")

    def evaluate(degree: int) -> Tensor:
        at_infinity = torch.zeros(1, degree, dtype=torch.float64, device="cpu")
        at_infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(degree, device="cpu"), at_infinity])

    inputs, kernels = torch.linalg.inv(evaluate(WINDOW)).T, evaluate(TAPS)
    largest = inputs.abs().amax(dim=1, keepdim=True)
    return Transforms(inputs / largest, kernels * largest, evaluate(TILE).T.contiguous())


def transform_kernel(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] to [36, C, O]."""
    matrix = transforms().kernels
    kernel = torch.empty(WINDOW, WINDOW, *weight.shape[1::-1], dtype=torch.float32, device="cpu")
    # In float64, a few channels at a time: the whole would take eight times the memory of the weight.
    for part, chunk in zip(weight.split(32, dim=1), kernel.split(32, dim=2), strict=True):
        chunk.copy_(torch.einsum("ik,jl,ockl->ijco", matrix, matrix, part.double()))
    return kernel.flatten(0, 1)


def transform_upsampling_kernel(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] of a convolution behind nearest upsampling to [36, C, 4 * O] of one on the map before it.

    An output sees, along a side, neighbours -1, 0, 0 of the small map where its place is even, and 0, 0, 1 where it is
    odd. The outputs are ordered (row, column, channel) in a 2 x 2 square.
    """
    merge = torch.tensor(
        [[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], dtype=weight.dtype, device="cpu"
    )
    merged = torch.einsum("rik,sjl,ockl->rsocij", merge, merge, weight)
    return transform_kernel(merged.flatten(0, 2))


class Kernel:
    """A kernel in transformed form, ready for the products of a strip.

    oneDNN's product with weights in its own blocked layout is twice as fast as the one behind `torch.bmm` where that
    library does not use all of the processor (MKL on AMD's), and as fast elsewhere.

    Args:
        transformed: [36, C, O].
        rows: tiles that a strip usually has, for which the layout is chosen.
    """

    def __init__(self, transformed: Tensor, rows: int) -> None:
        self.outputs = transformed.shape[2]
        self.blocks: list[Tensor] = []
        self.plain: Tensor | None = None
        if torch.backends.mkldnn.is_available():
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.blocks = [reorder(part.T.contiguous(), rows) for part in transformed]
        else:
            self.plain = transformed

    def products(self, strips: Tensor, out: Tensor) -> None:
        """[36, tiles, C] times the kernel into `out`, [36, tiles, O]."""
        if self.plain is not None:
            torch.bmm(strips, self.plain, out=out)
        for strip, block, target in zip(strips, self.blocks, out, strict=False):
            target.copy_(torch.ops.mkldnn._linear_pointwise(strip, block, None, "none", [], ""))


class Workspace:
    """Buffers by name; each grows to the largest size asked for."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor that holds what its name's buffer last held, until that is taken again."""
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=torch.float32, device="cpu")
        return self.buffers[name][:size].view(shape)


class Winograd:
    """Convolves strips, in the buffers of a workspace."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.inputs, _, self.outputs = (matrix.float() for matrix in transforms())

    def convolve(self, strip: Tensor, kernel: Kernel) -> Tensor:
        """A strip with a border of one [4 * h + 2, 4 * w + 2, C] by a kernel.

        Returns:
            [4, 4, h, w, O]: row and column in a tile, tile row and column, without bias; overwritten by the next call.
        """
        height, width, channels = strip.shape
        down, across, outputs = height // TILE, width // TILE, kernel.outputs
        row, column, _ = strip.stride()
        windows = strip.as_strided(
            (WINDOW, WINDOW, down, across, channels), (row, column, TILE * row, TILE * column, 1),
            strip.storage_offset(),
        )  # fmt: skip
        gathered = self.work.take("gathered", *windows.shape)
        gathered.copy_(windows)
        transformed = self._both_sides(self.inputs, gathered.view(WINDOW, WINDOW, -1), "transformed")
        products = self.work.take("products", WINDOW**2, down * across, outputs)
        kernel.products(transformed.view(WINDOW**2, down * across, channels), products)
        results = self._both_sides(self.outputs, products.view(WINDOW, WINDOW, -1), "results")
        return results.view(TILE, TILE, down, across, outputs)

    def _both_sides(self, matrix: Tensor, values: Tensor, name: str) -> Tensor:
        """[m, k] applied to the first two axes of [k, k, n]: [m, m, n]."""
        m, k = matrix.shape
        n = values.shape[2]
        half, whole = self.work.take("half", m, k, n), self.work.take(name, m, m, n)
        torch.mm(matrix, values.view(k, k * n), out=half.view(m, k * n))
        return torch.bmm(matrix.expand(m, m, k), half, out=whole)
