"""Parquet files, whose damage is told from a file system that fails.

The only importer of pyarrow. Owns: opening, batches of rows from any place, rows written with a column more. Does not
own: which columns mean what.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

_GROUP_ROWS, _GROUP_BYTES = 1024, 1 << 26
"""Rows, or bytes of them, that are written as one row group at the most (and one batch more)."""


class ParquetDamage(ValueError):
    """The file is cut off, corrupt or no parquet at all."""


@contextmanager
def opened_parquet(file: BinaryIO) -> Iterator[Any]:
    """`pyarrow.parquet.ParquetFile` over a file; what pyarrow raises inside of it means damage.

    Raises:
        ParquetDamage: as it says.
        OSError: the file system failed.
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"parquet files need pyarrow: pip install 'dalle-torch[train]' ({error})") from error
    try:
        yield pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ParquetDamage(_line(error)) from error
    except OSError as error:
        # pyarrow's own come without a number, a file system's with one or as a type of their own.
        if error.errno is not None or type(error) is not OSError:
            raise
        raise ParquetDamage(_line(error)) from error


def row_batches(parquet: Any, columns: Sequence[str], first: int = 0, size: int = 64) -> Iterator[Any]:
    """`pyarrow.RecordBatch`es of at most `size` rows, from row `first` on; row groups before it are not read."""
    groups: list[int] = []
    skipped = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if not groups and skipped + rows <= first:
            skipped += rows
        else:
            groups.append(group)
    left = first - skipped
    if not groups:
        return
    for batch in parquet.iter_batches(size, row_groups=groups, columns=list(columns), use_threads=False):
        if left >= len(batch):
            left -= len(batch)
            continue
        yield batch.slice(left)
        left = 0


def check_columns(parquet: Any, columns: Sequence[str], url: str) -> None:
    """Raises ValueError where a column is missing; the message lists those that are there."""
    names = parquet.schema_arrow.names
    if missing := [column for column in columns if column not in names]:
        raise ValueError(f"{url} has no column {' and no '.join(missing)}; it has: {', '.join(names)}")


def check_text(parquet: Any, column: str, url: str) -> None:
    """Raises ValueError where a column holds anything but strings, or lists of them; one of nulls alone may pass."""
    from pyarrow import types

    kind = parquet.schema_arrow.field(column).type
    while hasattr(kind, "value_type") and not types.is_map(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    if str(kind) not in names and not types.is_fixed_size_binary(kind):
        raise ValueError(
            f"{url}: its column {column} is {kind}, and captions are strings; name the column that has them"
        )


def plain_columns(parquet: Any) -> list[str]:
    """Names of the columns of numbers, truth values and strings."""
    from pyarrow import types

    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_string)
    return [column.name for column in parquet.schema_arrow if any(kind(column.type) for kind in kinds)]


def python_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `pyarrow.RecordBatch`, of `python_values`."""
    for row in zip(*(python_values(column) for column in batch.columns), strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def python_values(column: Any) -> list[Any]:
    """A column's values as Python's own; text that is no UTF-8 stays bytes, what Python cannot hold becomes None."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except _unknown():
        # Nothing makes a writer's strings UTF-8, and pyarrow gives none of a column where one is not.
        return [_value(cell) for cell in column]


class RowWriter:
    """Writes rows of another parquet file with one column of numbers more, all else as it was, metadata included.

    Args:
        schema: `pyarrow.Schema` of the rows.
        column: float64; a column of that name is replaced.
    """

    def __init__(self, path: Path, schema: Any, column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._column = column
        place = schema.get_field_index(column)
        self._old = None if place < 0 else column
        rest = schema if self._old is None else schema.remove(place)
        self._schema = rest.append(pa.field(column, pa.float64()))
        # Python's own file says what went wrong by number, such as a full disk.
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, self._schema)
        self._waiting: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
        finally:
            self._file.close()

    def write(self, rows: Sequence[tuple[Any, int]], values: Sequence[float]) -> None:
        """Write rows, each a `pyarrow.RecordBatch` and a place in it, with the values of the new column."""
        import pyarrow as pa

        first = 0
        while first < len(rows):
            batch, last = rows[first][0], first
            while last < len(rows) and rows[last][0] is batch:
                last += 1
            chosen = batch.take(pa.array([place for _, place in rows[first:last]]))
            chosen = chosen if self._old is None else chosen.drop_columns([self._old])
            column = pa.array(values[first:last], pa.float64())
            self._waiting.append(pa.record_batch([*chosen.columns, column], schema=self._schema))
            first = last
        waiting = sum(len(batch) for batch in self._waiting)
        if waiting >= _GROUP_ROWS or sum(batch.nbytes for batch in self._waiting) >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema))
            self._waiting = []


def _unknown() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (ValueError, OverflowError, NotImplementedError, pa.ArrowException)


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if isinstance(cell, Mapping):
            return {name: _value(cell[name]) for name in cell}
        if hasattr(cell, "as_buffer"):
            return cell.as_buffer().to_pybytes()
        return _value(cell.value) if hasattr(cell, "dictionary") else [_value(item) for item in cell]
    except _unknown():
        return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
