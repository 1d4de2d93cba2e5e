"""Statistics and preconditioners of equally large blocks.

Shapes: L parameters of one shape, each with K blocks of sizes (s0, s1, ...) in a region; N = L * K, filled up to a
multiple of the shards. Dimension i has statistics and preconditioners float32 [N, si, si].
Owns: what happens with blocks. Does not own: where blocks are (`blocking`), how roots are taken (`matrix_roots`).
Source: Anil et al., arXiv 2002.09018, algorithm 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dalle_torch import products
from dalle_torch.optim.shampoo.blocking import Region
from dalle_torch.optim.shampoo.factors import Factors, average_, average_product_
from dalle_torch.optim.shampoo.matrix_roots import Method, RootProblem, inverse_roots
from dalle_torch.optim.shampoo.options import ShampooOptions
from dalle_torch.optim.shampoo.sharding import OneDevice, Sharding

_ROOT_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 27, "xla": 1 << 25}
"""Elements, on a device, of the matrices whose roots are taken in one go: on a CPU they stay in cache, elsewhere in
memory. What is taken in one go is one chain of operations, and a program of many takes long to compile."""


class RegionMatrices:
    """The matrices of one region of L parameters.

    Attributes:
        region: the blocks, the same in each of the L.
        statistics, preconditioners: for each dimension of a block, [N, si, si].
        failures: roots that failed, for each parameter, int32 [L]; shared with the other regions.
        like: one of the parameters.
    """

    def __init__(
        self, region: Region, failures: Tensor, options: ShampooOptions, sharding: Sharding, like: Tensor
    ) -> None:
        self.region = region
        self.like = like
        self.failures = failures
        self.used = len(failures) * region.blocks
        self.sharding = sharding
        count = -(-self.used // sharding.shards) * sharding.shards
        self.statistics: list[Tensor] = []
        self.preconditioners: list[Tensor] = []
        for size in region.sizes:
            eye = torch.eye(size, device=like.device).expand(count, size, size)
            self.statistics.append(sharding.constrain(eye * options.matrix_epsilon, "blocks"))
            self.preconditioners.append(sharding.constrain(eye.clone(), "blocks"))

    def rows(self, start: int, stop: int) -> slice | None:
        """The matrices of the parameters from `start` to `stop`; None: of all, with the filling."""
        if start == 0 and stop == len(self.failures):
            return None
        return slice(start * self.region.blocks, stop * self.region.blocks)

    def accumulate(self, blocks: Tensor, rows: slice | None, factors: Factors) -> None:
        """S_i = beta2 S_i + w G_i G_i^T with G_i the block unfolded along dimension i."""
        for dim, statistics in enumerate(self.statistics):
            average_product_(_at(statistics, rows), _unfold(blocks, dim), factors.beta2, factors.weight2)
            self.sharding.constrain(statistics, "blocks")

    def apply(self, blocks: Tensor, rows: slice | None) -> Tensor:
        """Each dimension i of the blocks contracted with preconditioner i; [N, s0, s1, ...], contiguous."""
        sizes = blocks.shape[1:]
        for dim, preconditioners in enumerate(self.preconditioners):
            p = _at(preconditioners, rows)
            if dim == len(sizes) - 1 and dim > 0:
                blocks = torch.bmm(blocks.reshape(len(blocks), -1, sizes[dim]), p)
            else:
                product = torch.bmm(p.mT, _unfold(blocks.view(len(blocks), *sizes), dim))
                blocks = product.view(len(blocks), sizes[dim], *sizes[:dim], *sizes[dim + 1 :]).movedim(1, dim + 1)
                blocks = blocks.contiguous()
        return blocks.view(len(blocks), *sizes)

    def stack(self, dim: int) -> "_Stack":
        """The matrices of a dimension, whose roots are to be taken."""
        statistics = self.statistics[dim]
        failed = torch.zeros(len(statistics), dtype=torch.int32, device=statistics.device)
        return _Stack(statistics, self.preconditioners[dim], failed, self.sharding)

    def precondition(self, gradient: Tensor, result: Tensor, start: int, stop: int, factors: Factors | None) -> None:
        """Write the preconditioned blocks of `gradient` [stop - start, *shape] to `result`, of the same shape.

        With factors the statistics take the gradient in as well; the preconditioners are older than that.
        """
        if self._matrix_by_matrix(gradient):
            self._precondition_matrices(gradient, result, start, factors)
            return
        rows = self.rows(start, stop)
        blocks = self.sharding.cut(self.region, gradient, len(_at(self.statistics[0], rows)), self.like)
        if factors is not None:
            self.accumulate(blocks, rows, factors)
        self.sharding.paste(self.region, self.apply(blocks, rows), result, self.like)

    def _matrix_by_matrix(self, gradient: Tensor) -> bool:
        sizes = self.region.sizes
        one_device = isinstance(self.sharding, OneDevice)
        return one_device and len(sizes) == 2 and products.pays(gradient, math.prod(sizes) * min(sizes))

    def _precondition_matrices(self, gradient: Tensor, result: Tensor, start: int, factors: Factors | None) -> None:
        """`precondition` of blocks that are matrices, each taken through all its products while it is in cache.

        Preconditioners are symmetric but for rounding, so that the left one need not be transposed.
        """
        product, count = products.product, len(gradient) * self.region.blocks
        rows = slice(start * self.region.blocks, start * self.region.blocks + count)
        left, right = (stack[rows].unbind() for stack in self.preconditioners)
        left_moments, right_moments = (stack[rows].unbind() for stack in self.statistics)
        views = zip(self.region.views(gradient), self.region.views(result), strict=True)
        for index, (block, target) in enumerate(views):
            block = block.contiguous()
            if factors is not None:
                transposed = block.T.contiguous()
                for moments, unfolded in ((left_moments[index], block), (right_moments[index], transposed)):
                    average_(moments, product(unfolded, unfolded), factors.beta2, factors.weight2)
            target.copy_(product(product(left[index], block.T), right[index].T))


def _at(stack: Tensor, rows: slice | None) -> Tensor:
    return stack if rows is None else stack[rows]


def _unfold(blocks: Tensor, dim: int) -> Tensor:
    """[N, s0, s1, ...] -> [N, s_dim, all the others]."""
    if blocks.ndim == 2:
        return blocks.unsqueeze(2)
    if blocks.ndim == 3:
        return blocks if dim == 0 else blocks.mT
    return blocks.movedim(dim + 1, 1).flatten(2)


@dataclass
class _Stack:
    """Matrices whose roots are due: N statistics, their preconditioners, and which roots failed."""

    statistics: Tensor
    preconditioners: Tensor
    failed: Tensor
    sharding: Sharding

    def part(self, rows: slice) -> "_Stack":
        return _Stack(self.statistics[rows], self.preconditioners[rows], self.failed[rows], self.sharding)


def update_roots(
    matrices: Sequence[RegionMatrices], options: ShampooOptions, method: Method, padded_size: int, p: int
) -> None:
    """New preconditioners S^(-1/p) for all of `matrices`; a root that fails leaves the old one, and is counted.

    Matrices of one size are taken together, whichever parameters they are of.
    """
    device = matrices[0].failures.device
    problem = RootProblem(
        p=p,
        epsilon=options.matrix_epsilon,
        threshold=options.inverse_failure_threshold,
        padded_size=padded_size,
        # To look at a value, as whether Newton's iteration is done, the host would have to wait for it.
        static=device.type != "cpu",
    )
    owned = [(owner, dim, owner.stack(dim)) for owner in matrices for dim in range(len(owner.region.sizes))]
    for size in sorted({size for owner in matrices for size in owner.region.sizes}):
        stacks = [stack for owner, dim, stack in owned if owner.region.sizes[dim] == size]
        for batch in _whole_batches(stacks) if device.type == "xla" else _batches(stacks):
            _update_batch(batch, problem, method)
    for owner, _, stack in owned:
        owner.failures.add_(stack.failed[: owner.used].view(-1, owner.region.blocks).sum(1))


def _batches(stacks: Sequence[_Stack]) -> Iterator[list[_Stack]]:
    """The stacks cut and joined to batches of bounded size."""
    size, device = stacks[0].statistics.shape[-1], stacks[0].statistics.device.type
    room = capacity = max(1, _ROOT_ELEMENTS.get(device, 1 << 20) // size**2)
    batch: list[_Stack] = []
    for stack in stacks:
        start = 0
        while start < len(stack.statistics):
            rows = slice(start, start + room)
            batch.append(stack.part(rows))
            start += len(batch[-1].statistics)
            room -= len(batch[-1].statistics)
            if room == 0:
                yield batch
                batch, room = [], capacity
    if batch:
        yield batch


def _whole_batches(stacks: Sequence[_Stack]) -> Iterator[list[_Stack]]:
    """The stacks, whole and equally long, in batches of bounded size."""
    size, shards = stacks[0].statistics.shape[-1], stacks[0].sharding.shards
    for length, alike in groupby(sorted(stacks, key=_length), key=_length):
        most = max(1, _ROOT_ELEMENTS["xla"] // (size**2 * (length // shards)))
        each = list(alike)
        yield from (each[start : start + most] for start in range(0, len(each), most))


def _length(stack: _Stack) -> int:
    return len(stack.statistics)


def _update_batch(batch: Sequence[_Stack], problem: RootProblem, method: Method) -> None:
    sharding = batch[0].sharding
    spread = batch[0].statistics.device.type == "xla"
    # Where stacks are spread over devices, what is of one device has to be side by side, or it would be sent around.
    # A copy of one stack that nothing was done to in this step would keep its layout on torch_xla; a product has none.
    statistics = [stack.statistics for stack in batch]
    together = (torch.stack(statistics, dim=1) * 1.0).flatten(0, 1) if spread else _joined(statistics)
    roots, failed = inverse_roots(sharding.constrain(together, "blocks"), problem, method)
    lengths = [len(stack.statistics) for stack in batch]
    parts = [
        result.unflatten(0, (-1, len(batch))).unbind(1) if spread else result.split(lengths)
        for result in (roots, failed)
    ]
    all_fine = not problem.static and not bool(failed.any())
    for stack, new, bad in zip(batch, *parts, strict=True):
        kept = new if all_fine else torch.where(bad.view(-1, 1, 1), stack.preconditioners, new)
        stack.preconditioners.copy_(kept)
        sharding.constrain(stack.preconditioners, "blocks")
        stack.failed.copy_(bad)


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(stacks)) if len(stacks) > 1 else stacks[0]
