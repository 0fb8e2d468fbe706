"""Reads the protobuf wire format (protobuf.dev/programming-guides/encoding), as much as a frozen graph needs.

Values are views into the file's bytes: nothing is copied before a caller asks for the numbers of a constant.
"""

import struct
from collections.abc import Callable
from typing import Any

MAX_FIELDS = 1 << 22  # in one message; the largest honest case is a weight matrix stored number by number
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Value = int | memoryview
Schema = dict[int, tuple[str, Callable[[Value], Any]]]  # field number: (name, decoder)


class MalformedMessage(ValueError):
    """The bytes are not the message that they should be."""


def read(message: memoryview, schema: Schema) -> dict[str, list]:
    """The fields of `message` that `schema` names, each as a list of decoded values in file order; others skipped."""
    values: dict[str, list] = {name: [] for name, _ in schema.values()}
    position, count = 0, 0
    while position < len(message):
        count += 1
        if count > MAX_FIELDS:
            raise MalformedMessage(f"more than {MAX_FIELDS} fields")
        key, position = _varint(message, position)
        value, position = _value(message, position, key & 7)
        if key >> 3 == 0:
            raise MalformedMessage("field number 0")
        if key >> 3 in schema:
            name, decode = schema[key >> 3]
            values[name].append(decode(value))
    return values


def varints(message: memoryview) -> list[int]:
    """A packed field of variable-length integers."""
    values, position = [], 0
    while position < len(message):
        value, position = _varint(message, position)
        values.append(signed(value))
    return values


def signed(value: Value) -> int:
    """int32, int64, bool or enum: two's complement in 64 bits."""
    if not isinstance(value, int):
        raise MalformedMessage("bytes where a number belongs")
    value &= 2**64 - 1
    return value - 2**64 if value >> 63 else value


def raw(value: Value) -> memoryview:
    """Bytes or an embedded message, not copied."""
    if not isinstance(value, memoryview):
        raise MalformedMessage("a number where bytes belong")
    return value


def text(value: Value) -> str:
    try:
        return str(raw(value), "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedMessage("text that is not UTF-8") from error


def number32(value: Value) -> float:
    """A `float` field."""
    if len(raw(value)) != 4:
        raise MalformedMessage("a float that is not four bytes long")
    return struct.unpack("<f", value)[0]


def _value(message: memoryview, position: int, wire_type: int) -> tuple[Value, int]:
    if wire_type == VARINT:
        return _varint(message, position)
    if wire_type == BYTES:
        size, position = _varint(message, position)
    elif wire_type in (FIXED32, FIXED64):
        size = 4 if wire_type == FIXED32 else 8
    else:
        raise MalformedMessage(f"wire type {wire_type}")
    if size > len(message) - position:
        raise MalformedMessage("a field that ends after its message")
    return message[position : position + size], position + size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position == len(message):
            raise MalformedMessage("a number cut short")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise MalformedMessage("a number longer than ten bytes")
