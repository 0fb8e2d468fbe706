"""Runs a frozen TensorFlow graph in PyTorch by interpreting the graph's own nodes.

Only the operations of classify_image_graph_def.pb (inception-2015-12-05) are known; any other is refused by name.
Batch normalisation is folded into the convolution before it (in float64). Inside, images are NCHW in channels-last
memory, the layout in which convolutions are fastest on both CPU and GPU; TensorFlow's NHWC is the same memory.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.c2i.graph_def import Node


class FrozenGraph(nn.Module):
    """The part of a graph between one fed node and the wanted ones.

    Called with images (N, H, W, C), float or uint8, in place of node `feed`; returns the values of the nodes `outputs`,
    a tuple of (N, C, H, W) tensors. Raises `ValueError`, `LookupError` or `TypeError` for another graph than ADM's.
    """

    def __init__(self, nodes: dict[str, Node], feed: str, outputs: tuple[str, ...]) -> None:
        super().__init__()
        graph, layers = torch.fx.Graph(), {}  # the graph's code forgets each value after its last use
        prepared = graph.placeholder("prepared")
        values = {feed: prepared}

        def value(name: str) -> torch.fx.Node:
            """What a node gives, after what its inputs give."""
            if name not in values:
                if name not in nodes:
                    raise ValueError(f"there is no node {name!r}")
                node = nodes[name]
                sources = [value(source) for source in (node.inputs[1:] if node.op == "Concat" else node.inputs[:1])]
                if node.op in ("Identity", "CheckNumerics"):  # the evaluator checks the features instead
                    values[name] = sources[0]
                else:
                    layers[name] = _layer(node, nodes)
                    values[name] = graph.call_module(name, tuple(sources))
            return values[name]

        graph.output(tuple(value(name) for name in outputs))
        self.preparation = nn.Sequential()
        for node in list(graph.nodes):
            layer, source = layers.get(node.target), node.args[0] if node.args else None
            if source is prepared and isinstance(layer, ResizeBilinear | Affine):
                self.preparation.append(layer)
            elif isinstance(layer, BatchNorm | nn.ReLU) and _can_fold(layers.get(source.target), source):
                layers[source.target].fold(layer)
            elif isinstance(layer, BatchNorm):
                raise ValueError(f"node {node.target!r} is not the only user of a convolution")
            else:
                continue
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        self.convolve = torch.fx.GraphModule(layers, graph)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.convolve(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Resized and normalised images (N, C, H, W). On the CPU two at a time, which caches hold."""
        if not self.preparation:  # resizing takes bytes as they are
            images = images.float()
        parts = images.permute(0, 3, 1, 2).split(2 if images.device.type == "cpu" else max(1, len(images)))
        return torch.cat([self.preparation(part) for part in parts])


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

    def fold(self, layer: "BatchNorm | nn.ReLU") -> None:
        """Do what `layer` does after this."""
        if isinstance(layer, nn.ReLU):
            self.relu = True
            return
        weight = self.weight * layer.scale.view(-1, 1, 1, 1)
        self.weight = weight.float().contiguous(memory_format=torch.channels_last)
        self.bias = (self.bias * layer.scale + layer.shift).float()

    def forward(self, x: Tensor) -> Tensor:
        padding = _symmetric_padding(x, self.weight.shape[2:], self.stride, self.padding)
        x = F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, self.stride, padding)
        return x.relu_() if self.relu else x


class BatchNorm(nn.Module):
    """Multiplies each output channel of a convolution by `scale` and adds `shift`, both (out,) float64."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift


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
    sizes = zip(x.shape[2:], kernel, stride, strict=True)
    rows, columns = (max((-(-size // step) - 1) * step + width - size, 0) for size, width, step in sizes)
    if rows % 2 or columns % 2:
        raise ValueError(f"SAME padding of {rows} rows and {columns} columns is not symmetric")
    return rows // 2, columns // 2


def _can_fold(layer: nn.Module | None, value: torch.fx.Node) -> bool:
    return isinstance(layer, Convolution) and not layer.relu and len(value.users) == 1


def _layer(node: Node, nodes: dict[str, Node]) -> nn.Module:
    """What a node does to images."""

    def constant(position: int, dtype: type = np.float64) -> Tensor:
        return torch.from_numpy(nodes[node.inputs[position]].constant().astype(dtype))

    match node.op:
        case "Conv2D":
            weight = constant(1, np.float32).permute(3, 2, 0, 1)  # from (height, width, in, out)
            return Convolution(weight, _spatial(node, "strides"), node.attributes["padding"])
        case "BatchNormWithGlobalNormalization":
            mean, variance, beta, gamma = map(constant, (1, 2, 3, 4))
            scale = (variance + node.attributes["variance_epsilon"]).rsqrt()
            scale = scale * gamma if node.attributes["scale_after_normalization"] else scale
            return BatchNorm(scale, beta - mean * scale)
        case "Relu":
            return nn.ReLU()
        case "MaxPool" | "AvgPool":
            function = F.max_pool2d if node.op == "MaxPool" else average_pool
            return Pool(function, _spatial(node, "ksize"), _spatial(node, "strides"), node.attributes["padding"])
        case "Concat":
            return Concat()
        case "ResizeBilinear":
            return ResizeBilinear(*constant(1, np.int64).tolist())
        case "Sub":
            return Affine(shift=-constant(1).item())
        case "Mul":
            return Affine(scale=constant(1).item())
    raise ValueError(f"node {node.name!r} has the operation {node.op!r}, unknown in classify_image_graph_def.pb")


def _spatial(node: Node, key: str) -> tuple[int, int]:
    _, height, width, _ = node.attributes[key]
    return height, width
