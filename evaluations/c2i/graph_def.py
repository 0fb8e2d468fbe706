"""The nodes and constants of a frozen TensorFlow graph (a serialized GraphDef), read without TensorFlow.

Field numbers are those of tensorflow/core/framework/{graph,node_def,attr_value,tensor}.proto.
"""

import mmap
import os
from dataclasses import dataclass

import numpy as np

from evaluations.c2i.protobuf import MalformedMessage, number32, raw, read, signed, text, varints
from utils.program import UserError

MAX_FILE_BYTES = 1 << 30
MAX_NODES = 20_000
MAX_CONSTANT_ELEMENTS = 1 << 26
NUMPY_TYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8"), 19: np.dtype("<f2")}

GRAPH = {1: ("node", raw)}
NODE = {1: ("name", text), 2: ("op", text), 3: ("input", text), 5: ("attr", raw)}
ATTRIBUTE_ENTRY = {1: ("key", text), 2: ("value", raw)}
ATTRIBUTE = {
    1: ("list", raw),
    2: ("s", raw),
    3: ("i", signed),
    4: ("f", number32),
    5: ("b", signed),
    8: ("tensor", raw),
}
ATTRIBUTE_LIST = {3: ("i", lambda value: [signed(value)] if isinstance(value, int) else varints(value))}
SHAPE = {2: ("dim", raw), 3: ("unknown_rank", signed)}
DIMENSION = {1: ("size", signed)}
TENSOR = {
    1: ("dtype", signed),
    2: ("shape", raw),
    4: ("content", raw),
    5: ("float_val", raw),
    6: ("double_val", raw),
    7: ("int_val", lambda value: [signed(value)] if isinstance(value, int) else varints(value)),
    10: ("int64_val", lambda value: [signed(value)] if isinstance(value, int) else varints(value)),
}


@dataclass
class Node:
    """One operation; `inputs` are producers' names without the control inputs (`^name`) and without `:0`."""

    name: str
    op: str
    inputs: list[str]
    attributes: dict[str, memoryview]

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        lists = self._attribute(key)["list"]
        if not lists:
            return self._default(key, default)
        return [value for run in read(lists[-1], ATTRIBUTE_LIST)["i"] for value in run]

    def string(self, key: str, default: str | None = None) -> str:
        values = self._attribute(key)["s"]
        return str(values[-1], "utf-8", "replace") if values else self._default(key, default)

    def number(self, key: str) -> float:
        values = self._attribute(key)["f"]
        return values[-1] if values else 0.0  # zero is not stored

    def flag(self, key: str) -> bool:
        values = self._attribute(key)["b"]
        return bool(values and values[-1])

    def constant(self) -> np.ndarray:
        """The value of a Const node, as a read-only view of the file where it can be."""
        tensors = self._attribute("value")["tensor"]
        if self.op != "Const" or not tensors:
            raise MalformedMessage(f"{self.name!r} ({self.op}) should be a constant")
        return _array(tensors[-1], self.name)

    def _attribute(self, key: str) -> dict[str, list]:
        return read(self.attributes.get(key, memoryview(b"")), ATTRIBUTE)

    def _default(self, key: str, default):
        if default is None:
            raise MalformedMessage(f"{self.name!r} ({self.op}) has no {key!r}")
        return default


def read_graph(path: str | os.PathLike) -> dict[str, Node]:
    """The nodes of the graph in file order. A `UserError` if the file is missing or is not a graph."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise MalformedMessage("larger than 1 GiB")
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _nodes(content)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no graph file {path}; name classify_image_graph_def.pb with --graph.") from None
    except ValueError as error:  # MalformedMessage; mmap's for an empty file
        raise UserError(f"{path} is not a frozen TensorFlow graph ({error}); "
                        "name classify_image_graph_def.pb with --graph.") from None  # fmt: skip


def _nodes(content: memoryview) -> dict[str, Node]:
    messages = read(content, GRAPH)["node"]
    if not messages:
        raise MalformedMessage("no nodes")
    if len(messages) > MAX_NODES:
        raise MalformedMessage(f"more than {MAX_NODES} nodes")
    nodes = {}
    for message in messages:
        fields = read(message, NODE)
        if not fields["name"] or not fields["op"]:
            raise MalformedMessage("a node without a name or an operation")
        entries = [read(entry, ATTRIBUTE_ENTRY) for entry in fields["attr"]]
        attributes = {entry["key"][-1]: entry["value"][-1] for entry in entries if entry["key"] and entry["value"]}
        inputs = [source.removesuffix(":0") for source in fields["input"] if not source.startswith("^")]
        name = fields["name"][-1]
        nodes[name] = Node(name, fields["op"][-1], inputs, attributes)
    return nodes


def _array(message: memoryview, name: str) -> np.ndarray:
    fields = read(message, TENSOR)
    dtype = NUMPY_TYPES.get(fields["dtype"][-1] if fields["dtype"] else 0)
    if dtype is None:
        raise MalformedMessage(f"constant {name!r} has a type that is not read here")
    shape = [
        (read(dimension, DIMENSION)["size"] or [0])[-1]
        for part in fields["shape"]
        for dimension in read(part, SHAPE)["dim"]
    ]
    size = 1
    for length in shape:
        size *= length
        if length < 0 or size > MAX_CONSTANT_ELEMENTS or len(shape) > 8:
            raise MalformedMessage(f"constant {name!r} has the shape {shape[:9]}")
    values = _stored_values(fields, dtype)
    if len(values) == size:
        return values.reshape(shape)
    if fields["content"] or not 0 < len(values) < size:
        raise MalformedMessage(f"constant {name!r} holds {len(values)} numbers for the shape {shape}")
    if len(values) == 1:
        return np.broadcast_to(values[0], shape)
    return np.concatenate([values, np.full(size - len(values), values[-1])]).reshape(shape)  # the last one repeats


def _stored_values(fields: dict[str, list], dtype: np.dtype) -> np.ndarray:
    if fields["content"]:
        packed = fields["content"][-1:]
    elif dtype.kind == "i":
        numbers = [value for run in fields["int_val" if dtype.itemsize == 4 else "int64_val"] for value in run]
        if any(abs(value) >= 2 ** (8 * dtype.itemsize - 1) for value in numbers):
            raise MalformedMessage("an integer out of range")
        return np.array(numbers, dtype)
    else:
        packed = fields["float_val" if dtype.itemsize == 4 else "double_val"]
    joined = packed[0] if len(packed) == 1 else b"".join(packed)
    if len(joined) % dtype.itemsize:
        raise MalformedMessage("numbers cut short")
    return np.frombuffer(joined, dtype)
