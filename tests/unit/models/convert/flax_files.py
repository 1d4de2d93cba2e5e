"""Flax files for tests, packed by the msgpack library the way `flax/serialization.py` does."""

from pathlib import Path
from typing import Any

import msgpack
import numpy as np

NDARRAY, COMPLEX, SCALAR = 1, 2, 3


def pack_array(values: np.ndarray, dtype: str | None = None) -> bytes:
    """[shape, dtype's name, bytes]; `dtype` for those that NumPy lacks."""
    return msgpack.packb((values.shape, dtype or values.dtype.name, values.tobytes()))


def extension(value: Any) -> msgpack.ExtType:
    if isinstance(value, np.generic):
        return msgpack.ExtType(SCALAR, pack_array(np.asarray(value)))
    return msgpack.ExtType(NDARRAY, pack_array(value))


def pack_tree(tree: dict[str, Any]) -> bytes:
    """The file of a tree whose leaves are NumPy arrays, scalars, or anything that msgpack knows."""
    return msgpack.packb(tree, default=extension, strict_types=True)


def chunked(values: np.ndarray, size: int) -> dict[str, Any]:
    """An array in pieces of `size` numbers, as Flax stores those above 1 GiB."""
    flat = values.reshape(-1)
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(values.shape)},
        "chunks": {str(i): flat[at : at + size] for i, at in enumerate(range(0, flat.size, size))},
    }


def unpack_tree(path: Path) -> dict[str, np.ndarray]:
    """Path joined by "/" -> array, of a file without chunks, read by the msgpack library."""

    def array(code: int, data: bytes) -> np.ndarray:
        assert code == NDARRAY
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, dtype).reshape(shape)

    def flatten(node: Any, where: tuple[str, ...]) -> dict[str, np.ndarray]:
        if not isinstance(node, dict):
            return {"/".join(where): node}
        return {name: value for key, child in node.items() for name, value in flatten(child, (*where, key)).items()}

    return flatten(msgpack.unpackb(path.read_bytes(), ext_hook=array), ())


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of the flattening in `unpack_tree`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
