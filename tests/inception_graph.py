"""Writes frozen graphs with the node names, operations and topology of classify_image_graph_def.pb, at any width.

The weights are random. The protobuf bytes are written by hand, so that tests can also write what no library would.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded + bytes([value]))


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def text(number: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def float_number(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def attribute(name: str, value: bytes) -> bytes:
    return text(5, text(1, name) + text(2, value))


def integers(values: Iterable[int]) -> bytes:
    return text(1, text(3, b"".join(varint(value) for value in values)))


def tensor(array: np.ndarray, repeated: bool = False) -> bytes:
    """An AttrValue with a tensor; `repeated` writes only the first number, as TensorFlow does for constant tensors."""
    kind = {"float32": 1, "int32": 3}[array.dtype.name]
    shape = b"".join(text(2, integer(1, size)) for size in array.shape)
    if not repeated:
        content = text(4, array.tobytes())
    elif kind == 1:
        content = float_number(5, float(array.flat[0]))
    else:
        content = integer(7, int(array.flat[0]))
    return text(8, integer(1, kind) + text(2, shape) + content)


def node(operation: str, name: str, inputs: Iterable[str] = (), **attributes: bytes) -> bytes:
    body = text(1, name) + text(2, operation) + b"".join(text(3, source) for source in inputs)
    return text(1, body + b"".join(attribute(key, value) for key, value in attributes.items()))


FLOAT = integer(6, 1)


def constant(name: str, array: np.ndarray, repeated: bool = False) -> bytes:
    return node(
        "Const", name, dtype=integer(6, {"float32": 1, "int32": 3}[array.dtype.name]), value=tensor(array, repeated)
    )


class InceptionGraph:
    """The graph of 2015-12-05 with every width divided by `narrower`, as bytes in `.nodes`.

    `repeated` stores one number for every weight, which makes files of 200 kB: structure without content.
    """

    def __init__(self, narrower: int = 1, seed: int = 0, repeated: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.narrower, self.repeated = narrower, repeated
        self.nodes: list[bytes] = []
        self.channels = {"Mul": 3}  # of every layer's output
        self._preprocessing()
        self._stem()
        self._mixed_35x35()
        self._mixed_17x17()
        self._mixed_8x8()
        self._classifier()

    def content(self) -> bytes:
        return b"".join(self.nodes)

    def save(self, path: Path) -> Path:
        path.write_bytes(self.content())
        return path

    def _convolution(
        self, name: str, source: str, width: int, kernel: tuple[int, int], stride: int = 1, padding: str = "SAME"
    ) -> str:
        inputs, outputs = self.channels[source], max(8, width // self.narrower)
        scale = np.sqrt(2 / (kernel[0] * kernel[1] * inputs))
        weight = self.random.standard_normal((*kernel, inputs, outputs), dtype=np.float32) * np.float32(scale)
        near = lambda mean: (mean + 0.1 * self.random.standard_normal(outputs)).astype(np.float32)  # noqa: E731
        norm = f"{name}/batchnorm"
        moments = [f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")]
        self.nodes += [
            constant(f"{name}/conv2d_params", weight, self.repeated),
            node(
                "Conv2D",
                f"{name}/Conv2D",
                [source, f"{name}/conv2d_params"],
                T=FLOAT,
                strides=integers([1, stride, stride, 1]),
                padding=text(2, padding),
                use_cudnn_on_gpu=integer(5, 1),
            ),
            constant(moments[2], near(0)),
            constant(moments[3], near(1)),
            constant(moments[0], near(0)),
            constant(moments[1], np.abs(near(1))),
            node(
                "BatchNormWithGlobalNormalization",
                norm,
                [f"{name}/Conv2D", *moments],
                T=FLOAT,
                variance_epsilon=float_number(4, 0.001),
                scale_after_normalization=integer(5, 1),
            ),
            node("CheckNumerics", f"{name}/CheckNumerics", [norm], T=FLOAT, message=text(2, "not finite")),
            node("Identity", f"{name}/control_dependency", [norm, f"^{name}/CheckNumerics"], T=FLOAT),
            node("Relu", name, [f"{name}/control_dependency"], T=FLOAT),
        ]
        self.channels[name] = outputs
        return name

    def _chain(self, scope: str, source: str, *layers: tuple) -> str:
        """Convolutions named scope, scope_1, … one after the other; each (width, height, width of kernel[, stride])."""
        for index, (width, *kernel_and_stride) in enumerate(layers):
            kernel, stride = tuple(kernel_and_stride[:2]), (kernel_and_stride[2:] or [1])[0]
            name = scope if index == 0 else f"{scope}_{index}"
            source = self._convolution(name, source, width, kernel, stride, "VALID" if stride == 2 else "SAME")
        return source

    def _pool(self, operation: str, name: str, source: str, kernel: int, stride: int, padding: str) -> str:
        kind = {} if operation == "MaxPool" else {"T": FLOAT}
        self.nodes.append(
            node(
                operation,
                name,
                [source],
                ksize=integers([1, kernel, kernel, 1]),
                padding=text(2, padding),
                strides=integers([1, stride, stride, 1]),
                **kind,
            )
        )
        self.channels[name] = self.channels[source]
        return name

    def _join(self, name: str, sources: list[str]) -> str:
        dimension = f"{name}/concat_dim"
        self.nodes.append(constant(dimension, np.array(3, np.int32), repeated=True))
        self.nodes.append(node("Concat", name, [dimension, *sources], T=FLOAT, N=integer(3, len(sources))))
        self.channels[name] = sum(self.channels[source] for source in sources)
        return name

    def _preprocessing(self) -> None:
        scalar = lambda name, value: constant(name, np.array(value), repeated=True)  # noqa: E731
        self.nodes += [
            node("Const", "DecodeJpeg/contents", dtype=integer(6, 7), value=text(8, integer(1, 7) + text(8, b""))),
            node("DecodeJpeg", "DecodeJpeg", ["DecodeJpeg/contents"], channels=integer(3, 3)),
            node("Cast", "Cast", ["DecodeJpeg"], SrcT=integer(6, 4), DstT=FLOAT),
            scalar("ExpandDims/dim", np.int32(0)),
            node("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=FLOAT),
            constant("ResizeBilinear/size", np.array([299, 299], np.int32), repeated=True),
            node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], T=FLOAT),
            scalar("Sub/y", np.float32(128)),
            node("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=FLOAT),
            scalar("Mul/y", np.float32(1 / 128)),
            node("Mul", "Mul", ["Sub", "Mul/y"], T=FLOAT),
        ]

    def _stem(self) -> None:
        self._convolution("conv", "Mul", 32, (3, 3), 2, "VALID")
        self._convolution("conv_1", "conv", 32, (3, 3), 1, "VALID")
        self._convolution("conv_2", "conv_1", 64, (3, 3))
        self._pool("MaxPool", "pool", "conv_2", 3, 2, "VALID")
        self._convolution("conv_3", "pool", 80, (1, 1), 1, "VALID")
        self._convolution("conv_4", "conv_3", 192, (3, 3), 1, "VALID")
        self._pool("MaxPool", "pool_1", "conv_4", 3, 2, "VALID")

    def _mixed_35x35(self) -> None:
        source = "pool_1"
        for name, projection in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            branches = [
                self._chain(f"{name}/conv", source, (64, 1, 1)),
                self._chain(f"{name}/tower/conv", source, (48, 1, 1), (64, 5, 5)),
                self._chain(f"{name}/tower_1/conv", source, (64, 1, 1), (96, 3, 3), (96, 3, 3)),
                self._pooled(name, source, "AvgPool", projection),
            ]
            source = self._join(f"{name}/join", branches)
        branches = [
            self._chain("mixed_3/conv", source, (384, 3, 3, 2)),
            self._chain("mixed_3/tower/conv", source, (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
            self._pool("MaxPool", "mixed_3/pool", source, 3, 2, "VALID"),
        ]
        self._join("mixed_3/join", branches)

    def _mixed_17x17(self) -> None:
        source = "mixed_3/join"
        for name, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            down, up = (inner, 7, 1), (inner, 1, 7)
            branches = [
                self._chain(f"{name}/conv", source, (192, 1, 1)),
                self._chain(f"{name}/tower/conv", source, (inner, 1, 1), up, (192, 7, 1)),
                self._chain(f"{name}/tower_1/conv", source, (inner, 1, 1), down, up, down, (192, 1, 7)),
                self._pooled(name, source, "AvgPool", 192),
            ]
            source = self._join(f"{name}/join", branches)
        branches = [
            self._chain("mixed_8/tower/conv", source, (192, 1, 1), (320, 3, 3, 2)),
            self._chain("mixed_8/tower_1/conv", source, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
            self._pool("MaxPool", "mixed_8/pool", source, 3, 2, "VALID"),
        ]
        self._join("mixed_8/join", branches)

    def _mixed_8x8(self) -> None:
        source = "mixed_8/join"
        for name, pool in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
            first = self._chain(f"{name}/conv", source, (320, 1, 1))
            split = lambda scope, stem: [  # noqa: E731
                self._convolution(f"{scope}/mixed/conv", stem, 384, (1, 3)),
                self._convolution(f"{scope}/mixed/conv_1", stem, 384, (3, 1)),
            ]
            tower = split(f"{name}/tower", self._chain(f"{name}/tower/conv", source, (384, 1, 1)))
            deeper = self._chain(f"{name}/tower_1/conv", source, (448, 1, 1), (384, 3, 3))
            tower_1 = split(f"{name}/tower_1", deeper)
            last = self._pooled(name, source, pool, 192)
            source = self._join(f"{name}/join", [first, *tower, *tower_1, last])

    def _pooled(self, name: str, source: str, operation: str, width: int) -> str:
        pooled = self._pool(operation, f"{name}/tower_2/pool", source, 3, 1, "SAME")
        return self._chain(f"{name}/tower_2/conv", pooled, (width, 1, 1))

    def _classifier(self) -> None:
        pooled = self._pool("AvgPool", "pool_3", "mixed_10/join", 8, 1, "VALID")
        width = self.channels[pooled]
        weight = self.random.standard_normal((width, 1008), dtype=np.float32) * np.float32(2 / np.sqrt(width))
        self.nodes += [
            constant("pool_3/_reshape/shape", np.array([1, width], np.int32)),
            node("Reshape", "pool_3/_reshape", [pooled, "pool_3/_reshape/shape"], T=FLOAT),
            constant("softmax/weights", weight, self.repeated),
            constant("softmax/biases", self.random.standard_normal(1008, dtype=np.float32), self.repeated),
            node(
                "MatMul",
                "softmax/logits/MatMul",
                ["pool_3/_reshape", "softmax/weights"],
                T=FLOAT,
                transpose_a=integer(5, 0),
                transpose_b=integer(5, 0),
            ),
            node("BiasAdd", "softmax/logits", ["softmax/logits/MatMul", "softmax/biases"], T=FLOAT),
            node("Softmax", "softmax", ["softmax/logits"], T=FLOAT),
        ]
