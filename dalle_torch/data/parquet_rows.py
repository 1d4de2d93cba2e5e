"""Rows of a parquet file as Python values, text that is not UTF-8 among them.

Owns: values that Arrow calls strings and Python cannot decode. Does not own: reading the file (`parquet`).
"""

from collections.abc import Iterator, Mapping
from typing import Any


def python_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `pyarrow.RecordBatch`; a string that is not UTF-8 comes as the bytes that it is."""
    columns = [_values(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        # Rare, and slow: cell by cell.
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if isinstance(cell, Mapping):
            return {name: _value(cell[name]) for name in cell}
        if hasattr(cell, "as_buffer"):
            return cell.as_buffer().to_pybytes()
        if hasattr(cell, "dictionary"):
            return _value(cell.value)
        return [_value(item) for item in cell]
