"""Feature networks: what turns a batch of images into the features that the metrics compare.

Three of them share one interface: ADM's Inception graph in PyTorch, the same graph in TensorFlow (for cross-checking),
and any exported PyTorch program.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.c2i import tensorflow_backend
from evaluations.c2i.exported import load_exported, run_exported
from evaluations.c2i.frozen_graph import FrozenGraph
from evaluations.c2i.graph_def import read_graph
from evaluations.c2i.tensorflow_backend import receive, send
from utils.engine.parallel import forbid_tf32
from utils.files import sha256
from utils.program import UserError

IMAGE_NODE, POOL_NODE, SPATIAL_NODE, LOGITS_NODE = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
PUBLISHED_CLASSIFIER = (2048, 1008)
SPATIAL_CHANNELS = 7  # of the 17 × 17 map: 2,023 numbers, as many as fit beside the 2,048 of the pool


class Features(NamedTuple):
    pool: Tensor  # (N, D) float32: FID, Precision and Recall
    spatial: Tensor  # (N, S) float32: sFID
    logits: Tensor  # (N, C) float32: Inception Score


class FeatureNetwork(Protocol):
    device: torch.device  # where the features are

    def dimensions(self, height: int, width: int) -> tuple[int, int]:
        """Widths (D, S) of pool and spatial features for images of this size."""

    def __call__(self, images: Tensor) -> Features:
        """Features of images (N, H, W, 3) uint8."""

    def describe(self) -> dict[str, Any]:
        """What the report says about it."""

    def close(self) -> None: ...


class InceptionNetwork(nn.Module):
    """The frozen graph of ADM: (N, H, W, 3) numbers in 0..255 to pool, spatial and logits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        nodes = read_graph(path)
        self.graph = FrozenGraph(nodes, IMAGE_NODE, (POOL_NODE, SPATIAL_NODE))
        pool, spatial = self.graph.output_shapes(299, 299)
        logits = nodes.get(LOGITS_NODE)
        weight = nodes.get(logits.inputs[1]) if logits and len(logits.inputs) == 2 else None
        if weight is None:
            raise UserError(f"{path} has no weight at {LOGITS_NODE}; is it classify_image_graph_def.pb?")
        try:
            classifier = torch.from_numpy(np.array(weight.constant(), np.float32))
        except ValueError as error:
            raise UserError(f"the classifier of {path} cannot be read ({error}).") from None
        if pool[1:] != (1, 1) or spatial[0] < SPATIAL_CHANNELS or classifier.shape[:1] != pool[:1]:
            raise UserError(f"{path} is not the Inception graph of ADM: {POOL_NODE} has the shape {pool}, "
                            f"{SPATIAL_NODE} {spatial}, the classifier {tuple(classifier.shape)}.")  # fmt: skip
        self.dimensions = pool[0], SPATIAL_CHANNELS * spatial[1] * spatial[2]  # whatever the image size
        self.register_buffer("classifier", classifier)  # (D, C), used without the bias, as in ADM

    def forward(self, images: Tensor) -> Features:
        return self.convolve(self.graph.prepare(images))

    def convolve(self, prepared: dict[str, Tensor]) -> Features:
        """Features from what comes before the first convolution."""
        pool, spatial = self.graph.convolve(prepared)
        pool = pool.flatten(1).float()
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()  # NHWC order, as in TensorFlow
        return Features(pool, spatial, pool @ self.classifier)


class InceptionFeatures:
    """ADM's features in PyTorch; float32 without TF32, or bf16 (labelled in the report)."""

    def __init__(self, graph: Path, device: torch.device, precision: str = "fp32", compiled: bool = False) -> None:
        self.path, self.device, self.precision, self.compiled = graph, device, precision, compiled
        network = InceptionNetwork(graph).to(device).eval()
        if precision == "bf16":
            network.graph.bfloat16()  # pixels are normalised in float32, each convolution casts its input
        forbid_tf32()
        torch.backends.cudnn.benchmark = True
        self.network, self.convolve = network, network.convolve
        self.dimensions = lambda height, width: network.dimensions
        self.batch_size = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        count = len(images)
        self.batch_size = max(count, self.batch_size)
        if self.compiled and count < self.batch_size:  # one shape, so one compilation
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size - count))
        images = images.to(self.device, non_blocking=True)
        return Features(*(value[:count] for value in self._run(images)))

    def _run(self, images: Tensor) -> Features:
        prepared = self.network.graph.prepare(images)  # compiled code is slower at resizing
        if self.compiled and self.convolve == self.network.convolve:
            try:
                self.convolve = compile_frozen(self.network.convolve, prepared)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the machine lacks what compiling needs
                reason = (str(error).splitlines() or [""])[0]
                print(f"note: torch.compile does not work here ({reason}); going on without.", file=sys.stderr)
                self.compiled = False
        return self.convolve(prepared)

    def describe(self) -> dict[str, Any]:
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        return _description("inception", self.path, "torch", dtype, self.compiled)

    def close(self) -> None: ...


class ExportedFeatures:
    """Features of a program made with torch.export.save."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        forbid_tf32()
        self.network = load_exported(path, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        count = len(images)
        if count == 1:  # exports with a dynamic batch dimension may exclude 1
            images = images.expand(2, -1, -1, -1)
        return Features(*(value[:count] for value in run_exported(self.network, images.to(self.device), self.path)))

    def dimensions(self, height: int, width: int) -> tuple[int, int]:
        features = self(torch.zeros(1, height, width, 3, dtype=torch.uint8))
        return features.pool.shape[1], features.spatial.shape[1]

    def describe(self) -> dict[str, Any]:
        return _description("exported", self.path, "torch.export")

    def close(self) -> None: ...


class TensorFlowFeatures:
    """ADM's features by TensorFlow in a process of its own: importing Triton after TensorFlow aborts."""

    def __init__(self, graph: Path, device: torch.device) -> None:
        self.path, self.device = graph, device
        network = InceptionNetwork(graph)  # a wrong file gets the same sentences as from the other backend
        self.dimensions = lambda height, width: network.dimensions
        # As a file, not with -m, which would import from the current folder.
        command = [sys.executable, tensorflow_backend.__file__, str(graph), device.type]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.version = str(self._receive())

    def __call__(self, images: Tensor) -> Features:
        try:
            send(self.process.stdin, images.numpy())
        except BrokenPipeError:
            self._fail()
        return Features(*(torch.from_numpy(self._receive()).to(self.device) for _ in Features._fields))

    def describe(self) -> dict[str, Any]:
        return _description("inception", self.path, f"tensorflow {self.version}")

    def close(self) -> None:
        with suppress(BrokenPipeError):  # it ended already, with something still to read
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def _receive(self) -> np.ndarray:
        array = receive(self.process.stdout)
        if array is None:
            self._fail()
        return array

    def _fail(self) -> NoReturn:
        status = self.process.wait()
        raise UserError(f"the TensorFlow process ended with status {status} (its message is above); install it with "
                        "pip install -r evaluations/c2i/requirements.txt, or use --backend torch.")  # fmt: skip


def compile_frozen(function: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`function` compiled for arguments of the shape of `example`, its weights frozen into the code.

    `RuntimeError` if that fails.
    """
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(function, dynamic=False)
        compiled(example)
    return compiled


def can_compile(device: torch.device) -> bool:
    """Whether compiling pays: on the CPU, given the C++ compiler that it needs (GPUs run convolutions either way)."""
    return device.type == "cpu" and any(shutil.which(name) for name in ("g++", "clang++"))


def check_published_graph(path: Path) -> None:
    """Raise `UserError` unless `path` is a graph of the published one's structure and widths."""
    shape = tuple(InceptionNetwork(path).classifier.shape)
    if shape != PUBLISHED_CLASSIFIER:
        raise UserError(f"its classifier has the shape {shape} instead of {PUBLISHED_CLASSIFIER}.")


def _description(kind: str, path: Path, backend: str, dtype: str = "float32", compiled: bool = False) -> dict[str, Any]:
    return {"kind": kind, "file": str(path), "sha256": sha256(path), "backend": backend, "dtype": dtype, "tf32": False,
            "compiled": compiled}  # fmt: skip
