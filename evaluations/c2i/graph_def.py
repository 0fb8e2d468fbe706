"""The nodes and constants of a frozen TensorFlow graph (a serialized GraphDef), read without TensorFlow.

Field numbers are those of tensorflow/core/framework/{graph,node_def,attr_value,tensor}.proto, the encoding that of
protobuf.dev/programming-guides/encoding.
"""

import io
import math
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VARINT, BYTES = 0, 2  # wire types
FIXED_SIZES = {1: 8, 5: 4}  # of the other wire types, in bytes
NUMPY_TYPES = {1: np.dtype("<f4"), 3: np.dtype("<i4")}  # the only constants that are needed

Message = dict[int, list[int | bytes]]


@dataclass
class Node:
    """One operation; `inputs` are producers' names without the control inputs (`^name`) and without `:0`.

    `attributes` are numbers, text, lists of integers and constants (arrays); others are None.
    """

    name: str
    op: str
    inputs: list[str]
    attributes: dict[str, Any]

    def constant(self) -> np.ndarray:
        """The value of a Const node."""
        value = self.attributes.get("value")
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{self.name!r} ({self.op}) should be a constant of float32 or int32")
        return value


def read_graph(path: Path) -> dict[str, Node]:
    """The nodes of the graph in file order. Raises `ValueError` if the file is no graph, or only part of one."""
    try:
        nodes = [_node(message) for message in read_message(path.read_bytes())[1]]
    except (TypeError, LookupError, struct.error) as error:  # a field of another kind than it should be
        raise ValueError(f"unexpected contents, {error}") from error
    if not nodes:
        raise ValueError("no nodes")
    return {node.name: node for node in nodes}


def read_message(content: bytes) -> Message:
    """The values of each field in file order: variable-length integers as such, all others as bytes."""
    fields, stream = defaultdict(list), io.BytesIO(content)
    while stream.tell() < len(content):
        number, kind = divmod(_varint(stream), 8)
        if kind == VARINT:
            value = _varint(stream)
        else:
            size = _varint(stream) if kind == BYTES else FIXED_SIZES[kind]
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("a field ends after its message")
        fields[number].append(value)
    return fields


def _node(message: bytes) -> Node:
    fields = read_message(message)
    entries = [read_message(entry) for entry in fields[5]]
    return Node(
        name=str(fields[1][-1], "utf-8"),
        op=str(fields[2][-1], "utf-8"),
        inputs=[name.removesuffix(":0") for name in (str(value, "utf-8") for value in fields[3]) if name[:1] != "^"],
        attributes={str(entry[1][-1], "utf-8"): _attribute(entry[2][-1]) for entry in entries},
    )


def _attribute(message: bytes) -> Any:
    for number, values in read_message(message).items():
        value = values[-1]
        match number:
            case 1:
                return _integers(read_message(value)[3]).tolist()
            case 2:
                return str(value, "utf-8", "replace")
            case 3 | 5:
                return value
            case 4:
                return struct.unpack("<f", value)[0]
            case 8:
                return _array(read_message(value))
    return None


def _array(tensor: Message) -> np.ndarray | None:
    dtype = NUMPY_TYPES.get(tensor[1][-1])
    if dtype is None:
        return None
    sizes = [read_message(size)[1] for shape in tensor[2] for size in read_message(shape)[2]]
    shape = [size[-1] if size else 0 for size in sizes]
    if tensor[4]:
        values = np.frombuffer(tensor[4][-1], dtype)
    elif dtype.kind == "i":
        values = _integers(tensor[7]).astype(dtype)
    else:
        values = np.frombuffer(b"".join(tensor[5]), dtype)
    if missing := math.prod(shape) - len(values):
        values = np.pad(values, (0, missing), "edge")  # the last one repeats
    return values.reshape(shape)


def _integers(values: list[int | bytes]) -> np.ndarray:
    """A repeated field of integers, packed or one by one; two's complement in 64 bits."""
    numbers = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        stream = io.BytesIO(value)
        while stream.tell() < len(value):
            numbers.append(_varint(stream))
    return np.array(numbers, np.uint64).astype(np.int64)


def _varint(stream: io.BytesIO) -> int:
    """An integer of seven bits per byte, the lowest first."""
    value = shift = 0
    while True:
        byte = stream.read(1)[0]  # an IndexError where the message is cut short
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
