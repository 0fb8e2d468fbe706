"""A feature network from a torch.export file (.pt2), as evaluations/c2i/README.md describes it.

An exported program is code: its operators and guards run when it is called, so only files from a trusted source should
be named. What can be refused beforehand is refused: files that would make PyTorch unpickle arbitrary objects.
"""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from utils.program import UserError

MAX_PART_BYTES = 1 << 30  # of one file inside the archive


def load_exported(path: Path, device: torch.device) -> nn.Module:
    """The module in `path`, on `device`. `UserError` if it is missing, is no exported program, or holds pickles."""
    if not path.is_file():
        raise UserError(f"there is no exported network {path}; make one with torch.export.save (see the README).")
    _refuse_pickles(path)
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # whatever a damaged or foreign archive makes PyTorch's reader raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be loaded as a torch.export program ({reason}); "
                        "export it again with the installed PyTorch.") from error  # fmt: skip
    return move_to_device_pass(program, str(device)).module()


def run_exported(network: nn.Module, images: Tensor, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(pool, spatial, logits) of images (N, H, W, 3) uint8, checked against what was promised."""
    try:
        outputs: Any = network(images.float())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # guards of the export raise any of these
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not accept images of shape {tuple(images.shape)} ({reason}); "
                        "export it for this image size with a dynamic batch dimension.") from error  # fmt: skip
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in outputs]
    matrices = all(isinstance(shape, tuple) and len(shape) == 2 and shape[0] == len(images) for shape in shapes)
    if len(shapes) != 3 or not matrices:
        raise UserError(f"{path} returns {shapes}; it must return (pool (N, D), spatial (N, S), logits (N, C)).")
    return tuple(value.float() for value in outputs)


def _refuse_pickles(path: Path) -> None:
    """Refuse what `torch.export.load` would hand to an unrestricted unpickler."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > MAX_PART_BYTES for part in archive.infolist()):
                raise UserError(f"{path} holds a part larger than 1 GiB, which no feature network needs.")
            for name in archive.namelist():
                if name.endswith("_config.json") and _mentions_pickle(json.loads(archive.read(name))):
                    raise UserError(f"{path} holds pickled objects, which could run code when loaded; export a network "
                                    "of plain dense tensors.")  # fmt: skip
                if name.endswith(".pt"):
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds pickled objects other than tensors, which could run code when loaded; "
                        "export it with plain tensors as example inputs.") from None  # fmt: skip
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise UserError(f"{path} is not a torch.export file ({error}); save it with torch.export.save.") from None


def _mentions_pickle(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("use_pickle")) or any(_mentions_pickle(item) for item in value.values())
    return isinstance(value, list) and any(_mentions_pickle(item) for item in value)
