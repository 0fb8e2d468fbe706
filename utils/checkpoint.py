"""Reading weights: never unpickling code, always strict, always saying which weights were taken."""

import argparse
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from utils.program import UserError

WEIGHTS_CHOICES = ("auto", "ema", "raw")


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint on the CPU with `weights_only=True` (tensors and plain values only).

    Published files carry their settings as an `argparse.Namespace`, which is allowed. Raises `UserError` for a file
    that is missing, truncated, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; check the path (published: pretrained_models/README.md).")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].removesuffix(".")
        raise UserError(f"{path} holds more than weights and is not read, for safety: {reason}.") from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a complete PyTorch checkpoint; copy or download it again.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; expected a dict of tensors.")
    return checkpoint


def select_weights(checkpoint: dict, path: str | Path, weights: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """The model's `state_dict` inside `checkpoint` and what it is: `"ema"` or `"raw"`.

    `auto` takes the exponential moving average where the file has one. Raw weights are found under `model`, `module`
    or `state_dict`, or are the whole file (FSDP exports).
    """
    if weights == "ema" and not _is_state(checkpoint.get("ema")):
        raise UserError(f"{path} holds no EMA weights; use --weights raw.")
    if weights != "raw" and _is_state(checkpoint.get("ema")):
        state, kind = checkpoint["ema"], "ema"
    else:
        state = next((checkpoint[key] for key in ("model", "module", "state_dict") if key in checkpoint), checkpoint)
        kind = "raw"
    if not _is_state(state):
        raise UserError(f"{path} holds no model weights (looked for model, module, state_dict or plain tensors).")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}, kind


def _is_state(value) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def recorded_settings(checkpoint: dict) -> dict:
    """What a checkpoint says about its training, under `args` (published files) and `config`; {} if nothing."""
    recorded: dict = {}
    for key in ("args", "config"):
        settings = checkpoint.get(key)
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        recorded |= settings if isinstance(settings, dict) else {}
    return {name: value for name, value in recorded.items() if value is not None}


def load_strict(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, remedy: str) -> None:
    """Load `state` into `model`; every name and shape must match. `remedy` ends the error's sentence."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or shapes:
        differences = [
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
            for name in sorted(shapes)[:1]
        ]
        differences += [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        differences += [f"{len(unknown)} are unknown, such as {unknown[0]}"] if unknown else []
        raise UserError(f"{path} does not fit this model: {'; '.join(differences)}; {remedy}")
    model.load_state_dict(state, strict=True)
