"""The program inside a serialized executable of libtpu, for chips whose programs jaxlib cannot read back.

Owns: taking it out, and writing the one instruction that stands in the way as every version of XLA reads it. Does not
own: serializing and XLA's text (`compiler`).

On chips with SparseCores (v5p, v6e) XLA has rows of embeddings fetched by those. Such a fetch is reserved by an
`async-start` without operands and fed by an `async-update` that has the table and the places; the reader of protocol
buffers in jaxlib 0.10.2 knows `async-update` with one operand alone, the start. What the other operands are is told by
the computation that the start names.

An executable is a file of Riegeli records (github.com/google/riegeli, doc/riegeli_records_file_format.md), here with
nothing compressed; one of them has XLA's `HloModuleProtoWithConfig`, whose first field is the program
(github.com/openxla/xla, xla/service/hlo.proto).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_SIGNATURE = bytes.fromhex("83af70d10d884a3f")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_SIMPLE, _UNCOMPRESSED = ord("r"), 0

_FIELDS = {
    "Record": {"kept": (2, "Kept", False)},
    "Kept": {"module": (1, "Module", False)},
    "Module": {"computations": (3, "Computation", True)},
    "Computation": {"instructions": (2, "Instruction", True)},
    "Instruction": {"opcode": (2, "", False), "operand_ids": (36, "", True)},
}
"""What is looked at: number, message ("": plain), repeated. All else is kept as it is."""


def program_of(executable: bytes) -> bytes:
    """The `HloModuleProto` of what libtpu compiled, readable for XLA.

    Raises:
        ValueError: there is none, or the executable is not of the form that this module knows.
    """
    found = [module for record in _records(executable) if (module := _module(record)) is not None]
    if len(found) != 1:
        raise ValueError(f"{len(found)} programs in the executable, not one")
    for computation in found[0].computations:
        for instruction in computation.instructions:
            if instruction.opcode == b"async-update":
                del instruction.operand_ids[1:]
    return bytes(found[0].SerializeToString())


def _module(record: bytes) -> Any:
    try:
        module = message("Record").FromString(record).kept.module
    except DecodeError:
        return None
    return module if len(module.computations) else None


def _records(executable: bytes) -> Iterator[bytes]:
    start = executable.find(_SIGNATURE)
    if start < 0:
        raise ValueError("the executable holds no file of Riegeli records")
    file = executable[start:]
    # Blocks begin with a header of their own, wherever in a record they are.
    data = b"".join(file[place + _BLOCK_HEADER : place + _BLOCK] for place in range(0, len(file), _BLOCK))
    place = 0
    while place + _CHUNK_HEADER <= len(data):
        size = int.from_bytes(data[place + 8 : place + 16], "little")
        kind, chunk = data[place + 24], data[place + _CHUNK_HEADER : place + _CHUNK_HEADER + size]
        if len(chunk) < size:
            raise ValueError("the executable's file of records is cut short")
        if kind == _SIMPLE:
            yield from _split(chunk)
        place += _CHUNK_HEADER + size


def _split(chunk: bytes) -> Iterator[bytes]:
    """A chunk's records: how it is compressed, the length of their sizes, the sizes, the records."""
    if chunk[:1] != bytes([_UNCOMPRESSED]):
        raise ValueError("the executable's records are compressed")
    length, place = _number(chunk, 1)
    start = end = place + length
    while place < start:
        size, place = _number(chunk, place)
        yield chunk[end : end + size]
        end += size


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of as many bytes as it takes, seven bits in each, and where it ends."""
    value = shift = 0
    while place < len(data):
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
    raise ValueError("the executable's file of records is cut short")


def message(name: str) -> Any:
    """The class of a message of `_FIELDS`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"dalle_torch.hlo.{name}"))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    plain = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dalle_torch/hlo.proto", package="dalle_torch.hlo", syntax="proto3")
    for message_name, fields in _FIELDS.items():
        described = file.message_type.add(name=message_name)
        for name, (number, of, repeated) in fields.items():
            described.field.add(
                name=name,
                number=number,
                label=plain.LABEL_REPEATED if repeated else plain.LABEL_OPTIONAL,
                type=plain.TYPE_MESSAGE if of else plain.TYPE_INT64 if repeated else plain.TYPE_BYTES,
                type_name=f".dalle_torch.hlo.{of}" if of else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
