"""Merging keeps tensors whole, blocks cover them once, and cutting and pasting are inverse."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.optim.shampoo.blocking import merged_shape, regions

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@given(shapes, st.integers(1, 100))
def test_merging_keeps_the_number_of_elements_and_never_exceeds_the_limit(shape: tuple[int, ...], limit: int) -> None:
    merged = merged_shape(shape, limit)
    assert math.prod(merged) == math.prod(shape)
    assert len(merged) <= max(1, len(shape))
    assert all(size <= limit or size in shape for size in merged)
    assert merged == (1,) or 1 not in merged


@given(shapes, st.integers(1, 100))
def test_no_two_neighbours_could_still_be_merged(shape: tuple[int, ...], limit: int) -> None:
    merged = merged_shape(shape, limit)
    assert all(left * right > limit for left, right in pairwise(merged))
    assert merged_shape(merged, limit) == merged


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((2048, 4096), 4096, (2048, 4096)),
        ((3, 3, 6, 10), 16, (9, 6, 10)),
        ((3, 3, 6, 10), 4096, (540,)),
        ((1, 1, 4, 1), 4096, (4,)),
        ((1, 1), 4096, (1,)),
        ((5000, 2, 3), 10, (5000, 6)),
    ],
)
def test_shapes_merge_from_the_left(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]) -> None:
    assert merged_shape(shape, limit) == merged


@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.integers(1, 5))
def test_blocks_cover_every_element_once_and_paste_undoes_cut(count: int, shape: tuple[int, ...], size: int) -> None:
    stack = torch.arange(count * math.prod(shape)).view(count, *shape)
    pasted, seen = torch.full_like(stack, -1), []
    for region in regions(shape, size):
        assert all(side <= size for side in region.sizes)
        blocks = region.cut(stack)
        assert blocks.shape == (count * region.blocks, *region.sizes)
        seen.append(blocks.flatten())
        region.paste(blocks, pasted)
    assert torch.equal(pasted, stack)
    assert torch.equal(torch.cat(seen).sort().values, stack.flatten())


def test_the_blocks_of_a_tensor_are_neighbours() -> None:
    stack = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)])
    (region,) = regions((4, 6), 2)
    blocks = region.cut(stack)
    assert region.blocks == 6
    assert torch.equal(blocks[:6], torch.zeros(6, 2, 2))
    assert torch.equal(blocks[6:], torch.ones(6, 2, 2))


def test_leftovers_are_regions_of_their_own() -> None:
    found = regions((512, 1365), 256)
    assert [(region.counts, region.sizes) for region in found] == [((2, 5), (256, 256)), ((2, 1), (256, 85))]
    assert found[1].starts == (0, 1280)
