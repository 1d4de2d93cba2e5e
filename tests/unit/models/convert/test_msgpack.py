"""The reader of Flax files against the msgpack library, and against files that mean harm."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle_torch.models.convert.msgpack import MAX_DEPTH, MAX_ENTRIES, read_tensors
from dalle_torch.storage import CheckpointError
from tests.helpers import GOLDENS
from tests.unit.models.convert.flax_files import NDARRAY, chunked, extension, pack_array, pack_tree, unpack_tree


def write(folder: Path, data: bytes) -> Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(data)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    return {"/".join(names): tensor for names, tensor in read_tensors(path)}


@pytest.mark.parametrize("name", ["dallebart/normformer-glu", "dallebart/normformer-glu-scan", "vqgan/flax"])
def test_reads_what_the_msgpack_library_reads(name: str) -> None:
    path = GOLDENS / name / "flax_model.msgpack"
    ours, theirs = read(path), unpack_tree(path)
    assert list(ours) == list(theirs)
    for place, values in theirs.items():
        assert torch.equal(ours[place], torch.from_numpy(values.copy())), place


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"])
def test_every_dtype_at_every_alignment(tmp_path: Path, dtype: str) -> None:
    arrays = {"x" * length: np.arange(6, dtype=dtype).reshape(1, 2, 3) + length for length in range(1, 10)}
    for name, tensor in read(write(tmp_path, pack_tree(arrays))).items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor + 0, torch.from_numpy(arrays[name]))


def test_bfloat16_which_numpy_lacks(tmp_path: Path) -> None:
    values = torch.randn(5, 3).bfloat16()
    packed = msgpack.packb(((5, 3), "bfloat16", values.view(torch.int16).numpy().tobytes()))
    assert torch.equal(read(write(tmp_path, pack_tree({"a": msgpack.ExtType(NDARRAY, packed)})))["a"], values)


def test_scalars_empty_maps_and_chunks(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    tree = {"empty": {}, "step": np.float32(7), "deep": {"er": {"big": chunked(values, 7)}}, "after": np.ones(2)}
    tensors = read(write(tmp_path, pack_tree(tree)))
    assert list(tensors) == ["step", "deep/er/big", "after"]
    assert tensors["step"].shape == ()
    assert tensors["step"] == 7
    assert torch.equal(tensors["deep/er/big"], torch.from_numpy(values))


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_walking_through_needs_no_more_than_the_largest_tensor(tmp_path: Path) -> None:
    size, count = 64 * 2**20, 5
    path = tmp_path / "flax_model.msgpack"
    with path.open("wb") as file:
        file.write(msgpack.Packer().pack_map_header(count))
        for i in range(count):
            inner = msgpack.packb(((size // 4,), "float32"))
            inner = b"\x93" + inner[1:] + b"\xc6" + struct.pack(">I", size)
            file.write(msgpack.packb(f"{i}") + b"\xc9" + struct.pack(">Ib", len(inner) + size, NDARRAY) + inner)
            file.truncate(file.tell() + size)  # zeros that take no room on the disk
            file.seek(size, 1)
    before, highest, kept = resident(), 0, []
    for _, tensor in read_tensors(path):
        assert tensor.sum() == 0
        highest = max(highest, resident() - before)
        kept.append(tensor)
    assert len(kept) == count
    # One tensor, and room for what the allocator and torch's threads take.
    assert highest < 1.5 * size
    assert sum(tensor.sum() for tensor in kept) == 0, "tensors that are kept stay readable"


ARRAY = np.ones((2, 2), np.float32)


def raw(shape: object, dtype: object, values: object, code: int = NDARRAY) -> bytes:
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb((shape, dtype, values)))})


def bomb(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\x80"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "no map": (msgpack.packb([1, 2]), "a map of names is expected"),
    "a number": (msgpack.packb({"a": 3}), "at 'a'"),
    "none": (msgpack.packb({"a": None}), "a tensor is expected"),
    "a list": (msgpack.packb({"a": [1.0]}), "a tensor is expected"),
    "bytes": (msgpack.packb({"a": b"xx"}), "a tensor is expected"),
    "number as name": (msgpack.packb({1: 2}), "a name is expected"),
    "name no UTF-8": (b"\x81\xa1\xff\x80", "not UTF-8"),
    "name too long": (pack_tree({"a" * 5000: ARRAY}), "longer than"),
    "name beyond the file": (b"\x81\xdb\xff\xff\xff\xf0a" + b"\x00" * 20, "longer than"),
    "same name twice": (b"\x82" + 2 * (b"\xa1a" + msgpack.packb(extension(ARRAY))), "occurs twice"),
    "map beyond the file": (b"\xdf\xff\xff\xff\xff" + b"\xa1a\x80", "does not fit into the file"),
    "map of more than the limit": (b"\xdf" + struct.pack(">I", MAX_ENTRIES + 1) + b"\xa0\x80" * (MAX_ENTRIES + 1),
                                   "more than 100,000 entries"),
    "nested": (bomb(MAX_DEPTH + 5), "nested more than"),
    "nested very deep": (bomb(200_000), "nested more than"),
    "complex": (raw((1,), "complex64", b"\0" * 8), "dtype 'complex64' is not one of"),
    "native complex": (raw((1,), "float32", b"\0" * 4, code=2), "complex number"),
    "unknown extension": (raw((1,), "float32", b"\0" * 4, code=9), "extension type 9"),
    "unknown dtype": (raw((1,), "object", b"\0" * 8), "dtype 'object'"),
    "dtype of another type": (raw((1,), 4, b"\0" * 4), "a name is expected"),
    "too few bytes": (raw((2, 2), "float32", b"\0" * 15), "does not take the 15 bytes"),
    "too many bytes": (raw((2, 2), "float32", b"\0" * 17), "does not take the 17 bytes"),
    "huge shape": (raw((2**62, 2**62, 2**62), "float32", b"\0" * 4), "does not take the 4 bytes"),
    "shape that wraps to fit": (raw((2**62 + 1, 4), "float32", b"\0" * 16), "does not take the 16 bytes"),
    "negative shape": (raw((-300, -300), "float32", b"\0" * 4), "holds the size -300"),
    "negative twice": (raw((-2, -2), "float32", b"\0" * 16), "a size"),
    "size zero": (raw((0, 2**62), "float32", b""), "holds the size 0"),
    "size no integer": (raw((1.0,), "float32", b"\0" * 4), "a size is expected"),
    "nine dimensions": (raw((1,) * 9, "float32", b"\0" * 4), "at most 8 dimensions"),
    "shape no list": (raw(4, "float32", b"\0" * 4), "dimensions is expected"),
    "text as bytes": (raw((4,), "uint8", "abcd"), "bytes are expected"),
    "two parts": (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "float32")))}), "shape, dtype and bytes"),
    "rest in the extension": (
        msgpack.packb({"a": msgpack.ExtType(1, pack_array(ARRAY) + b"\0")}), "are announced"),
    "tensor longer than its extension": (
        b"\x81\xa1a\xc7\x05\x01" + pack_array(ARRAY), "but 5 are announced"),
    "rest after the tree": (pack_tree({"a": ARRAY}) + b"\0\0", "2 bytes follow"),
    "chunks that do not add up": (pack_tree({"a": {**chunked(ARRAY, 3), "shape": {"0": 5}}}), "do not add up"),
    "chunks of two dtypes": (
        pack_tree({"a": {**chunked(ARRAY, 3), "chunks": {"0": ARRAY[0], "1": np.ones(2)}}}), "of one dtype"),
    "chunks not flat": (pack_tree({"a": {**chunked(ARRAY, 3), "chunks": {"0": ARRAY}}}), "flat"),
    "chunks misnumbered": (
        pack_tree({"a": {**chunked(ARRAY, 3), "chunks": {"1": ARRAY[0]}}}), "entry 0 of a chunked array"),
    "chunks without pieces": (pack_tree({"a": {**chunked(ARRAY, 3), "chunks": {}}}), "sizes and pieces"),
    "chunked, with more": (pack_tree({"a": {**chunked(ARRAY, 3), "more": ARRAY}}), "has 3 entries"),
    "chunked, late marker": (pack_tree({"a": {"b": ARRAY, **chunked(ARRAY, 3)}}), "mixed with other entries"),
    "chunked, marker untrue": (
        pack_tree({"a": {**chunked(ARRAY, 3), "__msgpack_chunked_array__": False}}), "is not true"),
    "chunked root": (pack_tree(chunked(ARRAY, 3)), "mixed with other entries"),
    "chunked shape huge": (
        pack_tree({"a": {**chunked(ARRAY, 3), "shape": {"0": 2**63, "1": 2}}}), "do not add up"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line_with_little_memory(tmp_path: Path, kind: str) -> None:
    data, message = HOSTILE[kind]
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_entries_are_counted_over_all_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, pack_tree({f"{i}": {"a": {}, "b": {}} for i in range(400)}))
    assert read(path) == {}
    monkeypatch.setattr("dalle_torch.models.convert.msgpack.MAX_ENTRIES", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 entries"):
        read(path)


def test_a_missing_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_tensors(tmp_path / "flax_model.msgpack"))


SMALL: dict[str, Any] = {
    "model": {
        "layers": {
            "Dense_0": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(4, np.float16)}
        },
        "big": chunked(np.arange(10, dtype=np.int32), 4),
    },
    "scale": np.float64(2),
}


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    data = pack_tree(SMALL)
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            read(write(tmp_path, data[:length]))


Edit = tuple[str, int, bytes]


@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(["replace", "insert", "delete"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=9)
        ),
        min_size=1,
        max_size=6,
    ),
    golden=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_give_tensors_or_a_clear_error(tmp_path: Path, edits: list[Edit], golden: bool) -> None:
    original = GOLDENS / "dallebart" / "sandwich-rmsnorm-swish" / "flax_model.msgpack"
    data = bytearray(original.read_bytes() if golden else pack_tree(SMALL))
    for kind, at, new in edits:
        at %= len(data)
        data[at : at + (0 if kind == "insert" else len(new))] = b"" if kind == "delete" else new
        if not data:
            break
    path = write(tmp_path, bytes(data))
    tracemalloc.start()
    try:
        total = 0
        for names, tensor in read_tensors(path):
            assert all(isinstance(name, str) for name in names)
            assert min(tensor.shape, default=1) > 0
            total += tensor.nbytes
            tensor.clone()
        assert total <= len(data)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 2**20
