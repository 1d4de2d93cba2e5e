"""Tensors that lie together in one are saved from there, block by block, as if each was saved alone."""

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dalle_torch.checkpoint import CheckpointFolder
from dalle_torch.checkpoint.index import Entry, Part, Stack
from tests.unit.checkpoint.states import equal


def slices(stack: Stack) -> dict[str, Tensor]:
    rows = stack.rows
    return {
        name: stack.tensor[number * rows : (number + 1) * rows] if rows else stack.tensor[number]
        for number, name in enumerate(stack.names)
    }


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    rows, count, spare = draw(st.integers(0, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    bare = draw(st.lists(st.integers(1, 4), max_size=2))
    shape = [count * max(rows, 1) + spare, *bare]
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    return Stack(tensor, [f"p{number}" for number in range(count)], rows)


def ends(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A dimension in pieces, empty ones too, as devices that get nothing have."""
    inner = draw(st.lists(st.integers(0, size), max_size=3))
    return list(pairwise(sorted([0, *inner, size])))


@st.composite
def stacks_in_blocks(draw: st.DrawFn) -> tuple[Stack, Sequence[tuple[tuple[int, int], ...]]]:
    stack = draw(stacks())
    return stack, list(product(*(ends(draw, size) for size in stack.tensor.shape)))


@given(stacks_in_blocks())
def test_blocks_are_cut_as_slicing_would(case: tuple[Stack, Sequence[tuple[tuple[int, int], ...]]]) -> None:
    stack, blocks = case
    found = {name: torch.full_like(value, -1) for name, value in slices(stack).items()}
    entries = {name: Entry(stack.tensor.dtype, stack.shape) for name in stack.names}
    for number, block in enumerate(blocks):
        held = stack.tensor[tuple(slice(*reach) for reach in block)]
        offsets, sizes = tuple(start for start, _ in block), tuple(held.shape)
        for name, within, size, start in stack.cut(offsets, sizes):
            piece = held[start : start + size[0]] if stack.rows else held[start]
            assert piece.shape == size
            found[name][tuple(slice(a, a + b) for a, b in zip(within, size, strict=True))] = piece
            entries[name].parts.append(Part(within, size, f"{number}", start, 0, name))
            if piece.numel():
                # The way back, which reading takes, ends where it began.
                (back,) = stack.joined(
                    {other: Entry(stack.tensor.dtype, ()) for other in stack.names}
                    | {name: Entry(stack.tensor.dtype, stack.shape, entries[name].parts[-1:])}
                ).parts
                assert back.offsets == (offsets[0] + start, *offsets[1:])
    assert equal(found, slices(stack))
    for entry in entries.values():
        whole = [part for part in entry.parts if torch.Size(part.sizes).numel()]
        assert Entry(entry.dtype, entry.shape, whole).covered()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stacks_come_back_by_name(tmp_path: Path, asynchronous: bool) -> None:
    tall = Stack(torch.randn(9, 3), ["b", "a"], 4)
    bare = Stack(torch.randn(3, 2, 2).transpose(1, 2), ["c", "d", "e"], 0)
    counts = Stack(torch.tensor([5, 6]), ["b/step", "a/step"], 0)
    alone = {"weight": torch.randn(4)}
    expected = {name: value.clone() for stack in (tall, bare, counts) for name, value in slices(stack).items()}
    expected |= {name: value.clone() for name, value in alone.items()}
    folder = CheckpointFolder(str(tmp_path))
    folder.save(1, alone, {}, stacks=[tall, bare, counts], asynchronous=asynchronous)
    if asynchronous:
        for value in (tall.tensor, bare.tensor, counts.tensor, alone["weight"]):
            value.zero_()
        folder.wait()
    checkpoint = folder.newest()
    assert checkpoint is not None
    assert equal(checkpoint.read(), expected)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    with pytest.raises(ValueError, match="these come twice: a"):
        folder.save(1, {"a": torch.zeros(2)}, {}, stacks=[Stack(torch.zeros(2, 2), ["a", "b"], 0)])
    assert folder.steps() == []
