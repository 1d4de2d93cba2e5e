"""Batches cover every picture once and stay within their limit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.pipeline.batching import (
    MAX_AUTOMATIC,
    Batch,
    automatic_batch_size,
    bytes_per_picture,
    free_memory,
    is_out_of_memory,
)
from tests.tiny_pipeline import tiny_model


@given(prompts=st.integers(1, 9), images=st.integers(1, 9), limits=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_batches_cover_every_picture_once_in_order(prompts, images, limits):
    batches = [Batch(0, prompts, 0, images)]
    for limit in limits:
        batches = [smaller for batch in batches for smaller in batch.split(limit)]
    rows = [row for batch in batches for row in batch.rows(images)]
    assert sorted(rows) == list(range(prompts * images))
    assert all(1 <= batch.size <= min(limits) for batch in batches)
    assert all(len(batch.rows(images)) == batch.size for batch in batches)


def test_batches_are_even():
    assert [batch.size for batch in Batch(0, 1, 0, 9).split(4)] == [3, 3, 3]
    assert [batch.size for batch in Batch(0, 6, 0, 2).split(8)] == [6, 6]


def test_a_picture_takes_twice_the_memory_with_super_conditioning():
    model = tiny_model()
    assert bytes_per_picture(model, guided=True) == 2 * bytes_per_picture(model, guided=False)
    caches = 2 * 2 * 16 * 32 * 4  # keys and values, layers, image_length, d_model, float32
    assert bytes_per_picture(model, guided=False) > caches


def test_automatic_size_follows_free_memory(monkeypatch):
    model = tiny_model()
    need = bytes_per_picture(model, guided=True)
    for free, expected in ((0, 1), (need * 10, 6), (2**60, MAX_AUTOMATIC), (None, MAX_AUTOMATIC)):
        monkeypatch.setattr("dalle_torch.pipeline.batching.free_memory", lambda device, free=free: free)
        assert automatic_batch_size(model, guided=True) == expected


def test_free_memory_of_this_machine():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU ran out of memory in hbm"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected
