"""Feature networks: what turns a batch of images into the features that the metrics compare.

Three of them share one interface: ADM's Inception graph in PyTorch, the same graph in TensorFlow (for cross-checking),
and any exported PyTorch program. An exported program is code that runs when it is called: only files from a trusted
source should be named. What PyTorch would unpickle when it loads one is refused.
"""

import copy
import io
import logging
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from evaluations.c2i import tensorflow_backend
from evaluations.c2i.frozen_graph import FrozenGraph
from evaluations.c2i.graph_def import read_graph
from utils.files import sha256
from utils.precision import forbid_tf32
from utils.program import UserError, first_line
from utils.weight_files import is_archive, refuse_foreign, verify_archive

IMAGE_NODE, POOL_NODE, SPATIAL_NODE, LOGITS_NODE = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
PUBLISHED_CLASSIFIER = (2048, 1008)
SPATIAL_CHANNELS = 7  # of the 17 × 17 map: 2,023 numbers, as many as fit beside the 2,048 of the pool


class Features(NamedTuple):
    pool: Tensor  # (N, D) float32: FID, Precision and Recall
    spatial: Tensor  # (N, S) float32: sFID
    logits: Tensor  # (N, C) float32: Inception Score


class FeatureNetwork:
    """What all of them offer: called with images (N, H, W, 3) uint8, they return `Features`."""

    kind, backend, dtype, compiled = "inception", "torch", "float32", False  # for the report

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device  # the network's file; where the features are
        forbid_tf32()

    def dimensions(self, height: int, width: int) -> tuple[int, int]:
        """Widths (D, S) of pool and spatial features for images of this size."""
        return self.network.dimensions

    def __call__(self, images: Tensor) -> Features:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the report says about it."""
        named = {"kind": self.kind, "file": str(self.path), "sha256": sha256(self.path), "backend": self.backend}
        return named | {"dtype": self.dtype, "tf32": False, "compiled": self.compiled}

    def close(self) -> None: ...


class InceptionNetwork(nn.Module):
    """The frozen graph of ADM: (N, H, W, 3) numbers in 0..255 to pool, spatial and logits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        if not path.is_file():
            raise UserError(f"there is no graph file {path}; name classify_image_graph_def.pb with --graph.")
        try:
            nodes = read_graph(path)
            self.graph = FrozenGraph(nodes, IMAGE_NODE, (POOL_NODE, SPATIAL_NODE))
            classifier = torch.from_numpy(nodes[nodes[LOGITS_NODE].inputs[1]].constant().astype(np.float32))
            if not all(value.isfinite().all() for value in (*self.graph.state_dict().values(), classifier)):
                raise ValueError("weights that are NaN or infinite")
            self.register_buffer("classifier", classifier)  # (D, C), used without the bias, as in ADM
            pool, spatial = copy.deepcopy(self.graph).to("meta")(torch.empty(1, 299, 299, 3, device="meta"))
            pool.flatten(1) @ classifier.to("meta")  # they fit
        except (ValueError, LookupError, TypeError, RuntimeError) as error:  # whatever other contents lead to
            raise UserError(
                f"{path} is not ADM's frozen Inception graph, or is damaged ({first_line(error)}); "
                "name classify_image_graph_def.pb with --graph."
            ) from error
        self.dimensions = pool.shape[1], SPATIAL_CHANNELS * spatial[0, 0].numel()  # whatever the image size

    def forward(self, images: Tensor) -> Features:
        return self.convolve(self.graph.prepare(images))

    def convolve(self, prepared: Tensor) -> Features:
        pool, spatial = self.graph.convolve(prepared)
        pool = pool.flatten(1).float()
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()  # NHWC order, as in TensorFlow
        return Features(pool, spatial, pool @ self.classifier)


class InceptionFeatures(FeatureNetwork):
    """ADM's features in PyTorch; float32 without TF32, or bf16 (labelled in the report)."""

    def __init__(self, graph: Path, device: torch.device, precision: str = "none", compiled: bool = False) -> None:
        super().__init__(graph, device)
        self.network, self.compiled = InceptionNetwork(graph).to(device).eval(), compiled
        if precision == "bf16":
            self.network.graph.bfloat16()  # pixels are normalised in float32, each convolution casts its input
            self.dtype = "bfloat16"
        torch.backends.cudnn.benchmark = True
        self.convolve = self.network.convolve
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
                note = f"note: torch.compile does not work here ({first_line(error)}); going on without."
                print(note, file=sys.stderr)
                self.compiled = False
        return self.convolve(prepared)


class TensorFlowFeatures(FeatureNetwork):
    """ADM's features by TensorFlow in a process of its own: importing Triton after TensorFlow aborts."""

    def __init__(self, graph: Path, device: torch.device) -> None:
        super().__init__(graph, device)
        self.network = InceptionNetwork(graph)  # a wrong file gets the same sentences as from the other backend
        self.pipe, theirs = Pipe()
        # As a file, not with -m, which would import from the current folder.
        command = [sys.executable, tensorflow_backend.__file__, str(graph), device.type, str(theirs.fileno())]
        self.process = subprocess.Popen(command, stdout=2, pass_fds=[theirs.fileno()])
        theirs.close()
        self.backend = f"tensorflow {self._receive()}"

    def __call__(self, images: Tensor) -> Features:
        with suppress(BrokenPipeError):  # what it has left is the end
            self.pipe.send(images.numpy())
        return Features(*(torch.from_numpy(array).to(self.device) for array in self._receive()))

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.wait()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise UserError(
                f"the TensorFlow process ended with status {self.process.wait()} (its message is above); install it "
                "with pip install -r evaluations/c2i/requirements.txt, or use --backend torch."
            ) from error


class ExportedFeatures(FeatureNetwork):
    """Features of a program made with torch.export.save."""

    kind, backend = "exported", "torch.export"

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path, device)
        self.network = load_exported(path, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        count = len(images)
        if count == 1:  # exports with a dynamic batch dimension may exclude 1
            images = images.expand(2, -1, -1, -1)
        try:
            outputs = self.network(images.to(self.device).float())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:  # guards of the export raise any of these
            raise UserError(
                f"{self.path} does not accept images of shape {tuple(images.shape)} ({first_line(error)}); "
                "export it for this image size with a dynamic batch dimension."
            ) from error
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in outputs]
        matrices = all(isinstance(shape, tuple) and len(shape) == 2 and shape[0] == len(images) for shape in shapes)
        if len(shapes) != 3 or not matrices:
            raise UserError(
                f"{self.path} returns {shapes}; it must return (pool (N, D), spatial (N, S), logits (N, C))."
            )
        return Features(*(value[:count].float() for value in outputs))

    def dimensions(self, height: int, width: int) -> tuple[int, int]:
        features = self(torch.zeros(1, height, width, 3, dtype=torch.uint8))
        return features.pool.shape[1], features.spatial.shape[1]


def load_exported(path: Path, device: torch.device) -> torch.nn.Module:
    """The module in `path`, on `device`. `UserError` if it is missing, damaged, or no exported program."""
    if not path.is_file():
        raise UserError(f"there is no exported network {path}; make one with torch.export.save (see the README).")
    if is_archive(path):
        verify_archive(path)
    _refuse_other_archives(path)
    try:
        if _holds_pickles(path):
            raise UserError(f"{path} holds pickled objects, which could run code when loaded; export plain tensors.")
        with _without_log():
            program = torch.export.load(str(path))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign archive makes PyTorch's reader raise
        raise UserError(
            f"{path} is not a torch.export file that can be loaded ({first_line(error)}); "
            "save it with torch.export.save and the installed PyTorch."
        ) from error
    for name, tensor in {**program.state_dict, **program.constants}.items():
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds weights that are NaN or infinite ({name}); train or export it again.")
    return move_to_device_pass(program, str(device)).module()


def _refuse_other_archives(path: Path) -> None:
    """Raise `UserError` unless `path` is an archive of the kind that torch.export.save writes, or wrote until 2.7."""
    names = set()
    if is_archive(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    if not {"archive_format", "serialized_exported_program.json"} & names:
        refuse_foreign(path, "a torch.export file")
        raise UserError(f"{path} is not a torch.export file; save it with torch.export.save.")


@contextmanager
def _without_log() -> Iterator[None]:
    """PyTorch logs the traceback of what it then raises."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _holds_pickles(path: Path) -> bool:
    """Whether `torch.export.load` would hand anything but tensors to an unrestricted unpickler."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json") and re.search(rb'"use_pickle"\s*:\s*true', archive.read(name)):
                return True
            if name.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except pickle.UnpicklingError:
                    return True
    return False


def compile_frozen(function: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`function` compiled for arguments of the shape of `example`, its weights frozen into the code.

    `RuntimeError` if that fails.
    """
    from torch._inductor import config  # a second, which evaluations that do not compile save

    with config.patch(freezing=True):
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
