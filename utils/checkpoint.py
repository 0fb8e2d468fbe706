"""Reading weights: never unpickling code, always strict, always saying which weights were taken.

What holds weights is a PyTorch file (`.pt`), a safetensors file, or a folder in the form of the Hugging Face hub
(`config.json` beside `model.safetensors`, docs/hub.md); all are read into the same dictionary.
"""

import argparse
import hashlib
import json
import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from utils.files import sha256
from utils.program import UserError
from utils.recorded import CONFIG_KINDS, EXPORT_KINDS, MODEL_KINDS, check_kinds, damaged
from utils.weight_files import checksum, is_archive, read_safetensors, refuse_foreign, verify_archive

WEIGHTS_CHOICES = ("auto", "ema", "raw")
CONFIG, WEIGHTS, TOKENIZER_FOLDER = "config.json", "model.safetensors", "tokenizer"  # of the hub's form
EXPORT = "export"  # the part of config.json that says what was exported; the rest builds the model


def read_checkpoint(path: str | Path) -> dict:
    """Read weights on the CPU, and what is recorded of them: tensors and plain values only, every byte as written.

    A folder in the hub's form gives what a checkpoint of the trainer has, without the optimizer. Published files carry
    their settings as an `argparse.Namespace`, which is allowed. Raises `UserError` for what is missing, damaged, or
    holds no weights.
    """
    path = Path(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        return _read_hub_form(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; check the path (published: pretrained_models/README.md).")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    refuse_foreign(path, "a PyTorch checkpoint")
    archive = is_archive(path)
    if archive:
        verify_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is about to be refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise UserError(_unsafe(path, str(error))) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a complete PyTorch checkpoint; copy or download it again.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; expected a dict of tensors.")
    return checkpoint


def _unsafe(path: Path, reason: str) -> str:
    """A sentence in place of PyTorch's, which says how to run what the file holds."""
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    if named is None:
        return f"{path} is not a PyTorch checkpoint, or is damaged; check the path, or copy or download it again."
    return (
        f"{path} holds more than weights ({named[1]}) and is not read, for safety; ask whoever made it for a "
        "state_dict alone, or for a safetensors file."
    )


def _read_hub_form(folder: Path) -> dict:
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(
            f"the folder {folder} holds no weights: it has no {missing[0]}; name a checkpoint, a run folder, or one "
            f"with {CONFIG} and {WEIGHTS} (docs/hub.md)."
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        exported = config.pop(EXPORT, {})
        check_kinds(config, CONFIG_KINDS)
        check_kinds(config.get("model") or {}, MODEL_KINDS)
        check_kinds(exported, EXPORT_KINDS)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(damaged(folder / CONFIG, error)) from error
    tokenizer = folder / TOKENIZER_FOLDER
    return {
        "model": read_safetensors(folder / WEIGHTS),
        "weights": exported.get("weights"),
        "config": config,
        "args": exported.get("training", {}),
        "origin": exported.get("origin"),
        "license": exported.get("license"),
        "metrics": exported.get("metrics"),
        "places": {"tokenizer": str(tokenizer.absolute())} if tokenizer.is_dir() else {},
        **({"steps": exported["steps"]} if exported.get("steps") is not None else {}),
    }


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the bytes that hold weights: of a file, or of both files of a folder in the hub's form."""
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    return hashlib.sha256("".join(sha256(path / name) for name in (CONFIG, WEIGHTS)).encode()).hexdigest()


def converted_from(checkpoint: dict, state: dict[str, torch.Tensor]) -> str | None:
    """The `fingerprint` of what these weights were converted from, if nothing in them has changed since."""
    origin = checkpoint.get("origin")
    if not isinstance(origin, dict) or origin.get("content") != content_hash(checkpoint, state):
        return None
    return origin.get("sha256")


def content_hash(checkpoint: dict, state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights and of what they are recorded to be, whatever the form of the file."""
    tensors = {name: [str(value.dtype), list(value.shape), checksum(value)] for name, value in sorted(state.items())}
    content = [checkpoint.get("config"), tensors]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def select_weights(checkpoint: dict, path: str | Path, weights: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """The model's `state_dict` inside `checkpoint` and what it is: `"ema"` or `"raw"`.

    `auto` takes the exponential moving average where the file has one. Raw weights are found under `model`, `module`
    or `state_dict`, or are the whole file (FSDP exports). A converted file has one set, and says what it is.
    """
    if weights != "raw" and _is_state(checkpoint.get("ema")):
        state, kind = checkpoint["ema"], "ema"
    else:
        state = next((checkpoint[key] for key in ("model", "module", "state_dict") if key in checkpoint), checkpoint)
        kind = "ema" if checkpoint.get("weights") == "ema" else "raw"
    if weights not in ("auto", kind):
        held = "no EMA weights" if weights == "ema" else "EMA weights alone"
        raise UserError(f"{path} holds {held}; use --weights {kind}.")
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
    """Load `state` into `model`, which it must fit; as `check_fit`."""
    check_fit(model, state, path, remedy)
    model.load_state_dict(state, strict=True)


def check_fit(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, remedy: str) -> None:
    """Raise `UserError` unless `state` has every name and shape of `model`, and parameters that are finite numbers.

    `remedy` ends the sentence. The model may be on the meta device.
    """
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
    _refuse_values(model, state, path)


def _refuse_values(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Parameters must be finite floating-point numbers; what buffers hold is their module's affair."""
    for name, parameter in model.named_parameters():
        value = state[name].detach()
        if parameter.is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name} as {kind}; quantised weights are not read, give those in float.")
        value = value.float() if value.element_size() == 1 else value  # 8-bit floats have no minimum
        if value.numel() and not all(map(torch.isfinite, torch.aminmax(value))):
            raise UserError(
                f"{path} holds values in {name} that are not finite: its training diverged, or the file is damaged; "
                "take an earlier checkpoint, or copy it again."
            )
