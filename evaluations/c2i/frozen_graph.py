"""Runs a frozen TensorFlow graph in PyTorch by interpreting the graph's own nodes.

Only the operations of classify_image_graph_def.pb (inception-2015-12-05) are known; any other is refused by name.
Batch normalisation is folded into the convolution before it (in float64). Inside, images are NCHW in channels-last
memory, the layout in which convolutions are fastest on both CPU and GPU; TensorFlow's NHWC is the same memory.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from evaluations.c2i.graph_def import Node
from utils.program import UserError

MAX_SIDE = 4096  # of an image, kernel or stride
MAX_ACTIVATIONS = 1 << 27  # numbers in all layers' outputs for one image; Inception has 14 million


class FrozenGraph(nn.Module):
    """The part of a graph between one fed node and the wanted ones.

    Called with images (N, H, W, C), float or uint8, in place of node `feed`; returns the values of the nodes `outputs`,
    a tuple of (N, C, H, W) tensors. Raises `UserError` when the graph lacks a node or has one that cannot be run
    faithfully.
    """

    def __init__(self, nodes: dict[str, Node], feed: str, outputs: tuple[str, ...]) -> None:
        super().__init__()
        builder = _Builder(nodes, feed, outputs)
        self.feed, self.outputs = feed, tuple(builder.value_of[name] for name in outputs)
        self.layers = nn.ModuleList(layer for _, layer, _ in builder.steps)
        self.steps = [(name, arguments) for name, _, arguments in builder.steps]  # values are named after their nodes
        self.last_use = {value: index for index, (_, arguments) in enumerate(self.steps) for value in arguments}
        convolutions = (index for index, layer in enumerate(self.layers) if isinstance(layer, Convolution))
        self.start = next(convolutions, len(self.steps))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.convolve(self.prepare(images))

    def prepare(self, images: Tensor) -> dict[str, Tensor]:
        """Everything before the first convolution: values by name. On the CPU by two images, which caches hold."""
        if not isinstance(next(iter(self.layers), None), ResizeBilinear):  # which takes bytes as they are
            images = images.float()
        parts = images.permute(0, 3, 1, 2).split(2 if images.device.type == "cpu" else max(1, len(images)))
        prepared = [self._run({self.feed: part}, range(self.start)) for part in parts]
        return {name: torch.cat([values[name] for values in prepared]) for name in prepared[0]}

    def convolve(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Everything from the first convolution on."""
        values = self._run(dict(values), range(self.start, len(self.steps)))
        return tuple(values[name] for name in self.outputs)

    def _run(self, values: dict[str, Tensor], indices: range) -> dict[str, Tensor]:
        """Add the values of the steps `indices`, forget those that no later step needs."""
        for index in indices:
            name, arguments = self.steps[index]
            values[name] = self.layers[index](*(values[argument] for argument in arguments))
            for argument in set(arguments):
                if self.last_use[argument] == index and argument not in self.outputs:
                    del values[argument]
        return values

    def output_shapes(self, height: int, width: int, channels: int = 3) -> tuple[tuple[int, ...], ...]:
        """Shapes (C, H, W) of the outputs for one image, without computing them. `UserError` if a node does not fit."""
        values = {self.feed: torch.empty(1, channels, height, width, device="meta")}
        elements = 0
        for (name, arguments), layer in zip(self.steps, self.layers, strict=True):
            try:
                weights = {key: value.to("meta") for key, value in layer.state_dict().items()}
                value = functional_call(layer, weights, tuple(values[argument] for argument in arguments))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"the graph cannot be run: node {name!r} does not fit ({reason}).") from None
            elements += value.numel()
            if elements > MAX_ACTIVATIONS:
                raise UserError(f"the graph cannot be run: at node {name!r} one image takes more than "
                                f"{MAX_ACTIVATIONS} numbers.")  # fmt: skip
            values[name] = value
        return tuple(tuple(values[name].shape[1:]) for name in self.outputs)


class ResizeBilinear(nn.Module):
    """TensorFlow 1's resize: pixel i of the output samples `i · input / output`, neither half-pixel nor aligned.

    The horizontal interpolation comes first, and each is `low + (high - low) · weight` in float32, as in TensorFlow.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        x = self._interpolate_rows(x.permute(0, 3, 2, 1), self.width)  # (N, W, H, C): whole rows are quick to gather
        x = self._interpolate_rows(x.permute(0, 2, 1, 3), self.height)  # (N, H, W, C)
        return x.permute(0, 3, 1, 2)

    @staticmethod
    def _interpolate_rows(x: Tensor, size: int) -> Tensor:
        if x.shape[1] == size:
            return x
        scale = float(np.float32(x.shape[1]) / np.float32(size))
        position = torch.arange(size, dtype=torch.float32, device=x.device) * scale
        low = position.floor()
        weight = (position - low).view(-1, 1, 1)
        low = low.long()
        high = (low + 1).clamp(max=x.shape[1] - 1)
        x = x.contiguous()
        first = x.index_select(1, low).float()
        return x.index_select(1, high).float().sub_(first).mul_(weight).add_(first)


class Convolution(nn.Module):
    """Convolution, bias (the folded batch normalisation) and, where one follows, ReLU."""

    def __init__(self, weight: Tensor, stride: tuple[int, int], padding: str) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))  # (out, in, height, width)
        self.register_buffer("bias", torch.zeros(len(weight)))
        self.stride, self.padding, self.relu = stride, padding, False

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply each output channel by `scale` and add `shift`, both (out,) float64."""
        self.weight = (self.weight * scale.view(-1, 1, 1, 1)).float().contiguous(memory_format=torch.channels_last)
        self.bias = (self.bias * scale + shift).float()

    def forward(self, x: Tensor) -> Tensor:
        padding = _symmetric_padding(x, self.weight.shape[2:], self.stride, self.padding)
        x = F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, self.stride, padding)
        return x.relu_() if self.relu else x


class Pool(nn.Module):
    def __init__(self, function: Callable[..., Tensor], kernel: tuple[int, int], stride: tuple[int, int], padding: str):
        super().__init__()
        self.function, self.kernel, self.stride, self.padding = function, kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        padding = _symmetric_padding(x, self.kernel, self.stride, self.padding)
        return self.function(x, self.kernel, self.stride, padding)


class Affine(nn.Module):
    """`(x + shift) · scale`: the graph's own normalisation of pixels."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift).mul_(self.scale)


class Concat(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


def average_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """TensorFlow's average: padding is not counted."""
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)


def _symmetric_padding(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: str) -> tuple[int, int]:
    """TensorFlow's SAME or VALID as the rows and columns to add on each side of `x` (N, C, H, W)."""
    if padding == "VALID":
        return 0, 0
    total = [max((-(-size // s) - 1) * s + k - size, 0) for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    if total[0] % 2 or total[1] % 2:
        raise ValueError(f"SAME padding of {total[0]} rows and {total[1]} columns is not symmetric")
    return total[0] // 2, total[1] // 2


class _Builder:
    """Turns nodes into steps (name, layer, arguments), folding what follows a convolution into it."""

    def __init__(self, nodes: dict[str, Node], feed: str, outputs: tuple[str, ...]) -> None:
        self.nodes = nodes
        self.steps: list[tuple[str, nn.Module, tuple[str, ...]]] = []
        self.value_of = {feed: feed}  # node: the node that a step is named after, for those that add nothing
        self.convolution_of: dict[str, Convolution] = {}  # nodes whose only consumer may still be folded
        order = self._execution_order(feed, outputs)
        self.uses = Counter(source for name in order for source in self._image_inputs(nodes[name]))
        self.uses.update(outputs)
        operations = {
            "Conv2D": self._convolution,
            "BatchNormWithGlobalNormalization": self._batch_norm,
            "CheckNumerics": self._identity,  # the evaluator checks the features instead
            "Identity": self._identity,
            "Relu": self._relu,
            "MaxPool": self._pool,
            "AvgPool": self._pool,
            "Concat": self._concat,
            "ResizeBilinear": self._resize,
            "Sub": self._affine,
            "Mul": self._affine,
        }
        for name in order:
            node = nodes[name]
            if node.op not in operations:
                raise UserError(f"the graph cannot be run: node {name!r} has the unknown operation {node.op!r}; "
                                "only those of classify_image_graph_def.pb are known.")  # fmt: skip
            try:
                operations[node.op](node)
            except (ValueError, IndexError) as error:  # MalformedMessage among them
                raise UserError(f"the graph cannot be run: node {name!r} ({node.op}): {error}.") from None

    def _execution_order(self, feed: str, outputs: tuple[str, ...]) -> list[str]:
        """The nodes that the outputs need, each after its inputs."""
        order: dict[str, None] = {}
        open_nodes: set[str] = set()  # on the path from an output to where we are
        stack = [(name, False) for name in reversed(outputs)]
        while stack:
            name, inputs_done = stack.pop()
            if inputs_done:
                open_nodes.discard(name)
                order[name] = None
            elif name in open_nodes:
                raise UserError(f"the graph cannot be run: node {name!r} depends on itself.")
            elif name not in order and name != feed:
                if name not in self.nodes:
                    raise UserError(f"the graph has no node {name!r}; is it classify_image_graph_def.pb?")
                open_nodes.add(name)
                stack.append((name, True))
                stack += [(source, False) for source in self._image_inputs(self.nodes[name])]
        return list(order)

    @staticmethod
    def _image_inputs(node: Node) -> list[str]:
        """The inputs that are images; the others are constants."""
        return node.inputs[1:] if node.op == "Concat" else node.inputs[:1]

    def _constant(self, node: Node, position: int) -> np.ndarray:
        source = self.nodes.get(node.inputs[position])
        if source is None:
            raise ValueError(f"input {node.inputs[position]!r} is missing")
        return source.constant()

    def _add(self, node: Node, layer: nn.Module) -> None:
        arguments = tuple(self.value_of[source] for source in self._image_inputs(node))
        if not arguments:
            raise ValueError("no inputs")
        self.steps.append((node.name, layer, arguments))
        self.value_of[node.name] = node.name

    def _merge(self, node: Node) -> Convolution | None:
        """Let `node` stand for its input's value; the convolution that made it, if nothing else uses that value."""
        source = node.inputs[0]
        self.value_of[node.name] = self.value_of[source]
        convolution = self.convolution_of.get(source)
        if convolution is not None and self.uses[node.name] == 1:
            self.convolution_of[node.name] = convolution
        return convolution

    def _convolution(self, node: Node) -> None:
        weight = torch.from_numpy(np.array(self._constant(node, 1), np.float32))  # (height, width, in, out)
        if weight.ndim != 4 or node.string("data_format", "NHWC") != "NHWC":
            raise ValueError(f"weight of shape {list(weight.shape)}, data format {node.string('data_format', 'NHWC')}")
        if set(node.integers("dilations", [1])) != {1}:
            raise ValueError("a dilated convolution")
        layer = Convolution(weight.permute(3, 2, 0, 1), _spatial(node, "strides"), _padding(node))
        self._add(node, layer)
        if self.uses[node.name] == 1:
            self.convolution_of[node.name] = layer

    def _batch_norm(self, node: Node) -> None:
        mean, variance, beta, gamma = (
            torch.from_numpy(np.array(self._constant(node, position), np.float64)) for position in (1, 2, 3, 4)
        )
        scale = (variance + node.number("variance_epsilon")).rsqrt()
        if node.flag("scale_after_normalization"):
            scale = scale * gamma
        convolution = self._merge(node)
        if convolution is None:
            raise ValueError("batch normalisation that is not the only user of a convolution")
        if not len(convolution.bias) == scale.numel() == beta.numel() == mean.numel():
            raise ValueError(f"{scale.numel()} channels after a convolution with {len(convolution.bias)}")
        convolution.fold(scale.flatten(), (beta - mean * scale).flatten())

    def _identity(self, node: Node) -> None:
        self._merge(node)

    def _relu(self, node: Node) -> None:
        convolution = self.convolution_of.get(node.inputs[0])
        if convolution is None:
            self._add(node, nn.ReLU())
        else:
            convolution.relu = True
            self.value_of[node.name] = self.value_of[node.inputs[0]]

    def _pool(self, node: Node) -> None:
        function = F.max_pool2d if node.op == "MaxPool" else average_pool
        self._add(node, Pool(function, _spatial(node, "ksize"), _spatial(node, "strides"), _padding(node)))

    def _concat(self, node: Node) -> None:
        if self._constant(node, 0).tolist() != 3:
            raise ValueError("a join along another dimension than the channels")
        self._add(node, Concat())

    def _resize(self, node: Node) -> None:
        if node.flag("align_corners") or node.flag("half_pixel_centers"):
            raise ValueError("another sampling than TensorFlow 1's")
        height, width = self._constant(node, 1).tolist()
        if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
            raise ValueError(f"a size of {height} x {width}")
        self._add(node, ResizeBilinear(height, width))

    def _affine(self, node: Node) -> None:
        constant = self._constant(node, 1)
        if constant.size != 1:
            raise ValueError("a constant that is not one number")
        value = float(constant.reshape(()))
        self._add(node, Affine(shift=-value) if node.op == "Sub" else Affine(scale=value))


def _spatial(node: Node, key: str) -> tuple[int, int]:
    sizes = node.integers(key)
    if len(sizes) != 4 or sizes[0] != 1 or sizes[3] != 1 or not all(1 <= size <= MAX_SIDE for size in sizes):
        raise ValueError(f"{key} {sizes[:8]}")
    return sizes[1], sizes[2]


def _padding(node: Node) -> str:
    padding = node.string("padding")
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding {padding[:20]!r}")
    return padding
