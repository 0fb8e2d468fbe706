"""From a checkpoint to its tokenizer: the recorded configuration builds it, flags only check it.

Extraction, sampling and reconstruction all load here, so that they use the same weights.
"""

import inspect
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from pretrained_models.catalogue import find_weights, published_config
from tokenizer.base import ImageTokenizer
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQ_models
from utils.checkpoint import (
    WEIGHTS_CHOICES,
    converted_from,
    fingerprint,
    load_strict,
    read_checkpoint,
    recorded_settings,
    select_weights,
)
from utils.component import call_of, is_component, load_component, placeless, short_name
from utils.program import UserError
from utils.recorded import check_fields
from utils.settings import REQUIRED, option, refuse_differences, settings

DEFAULT_TOKENIZER = "VQ-16"
TOKENIZER_HELP = (
    "weights of the tokenizer: a checkpoint, a run folder, a name of pretrained_models/README.md, or a folder or "
    "repository (ORG/NAME, ORG/NAME@REVISION) in the form of the Hugging Face hub"
)
WEIGHTS_HELP = "which weights of the tokenizer's checkpoint; auto: the averaged ones (EMA) where it has them"


@settings("tokenizer")
class TokenizerSettings:
    """Which tokenizer to load; results are identified by the `TokenizerInfo` of what was loaded, not by these."""

    vq_ckpt: str = option(REQUIRED, TOKENIZER_HELP)
    vq_model: str | None = option(
        None,
        f"tokenizer: {', '.join(VQ_models)}, or a class of your own as FILE.py:NAME or 'FILE.py:NAME(key=value)'; "
        f"default: what the checkpoint says, or {DEFAULT_TOKENIZER}",
    )
    codebook_size: int | None = option(None, "number of codes; default: what the checkpoint says, or 16384", at_least=1)
    codebook_embed_dim: int | None = option(
        None, "length of a code's vector; default: what the checkpoint says, or 8", at_least=1
    )
    vq_weights: str = option("auto", WEIGHTS_HELP, choices=WEIGHTS_CHOICES)


@settings("tokenizer")
class StandaloneTokenizerSettings(TokenizerSettings):
    """For programs that load no other weights."""

    vq_weights: str = option("auto", WEIGHTS_HELP, choices=WEIGHTS_CHOICES, aliases=("--weights",))


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer this is; `dataclasses.asdict` of it goes into what it produced."""

    name: str  # of `VQ_models`, or the identity of a user's class
    codebook_size: int
    codebook_embed_dim: int | None  # None where codes have no vectors
    downsample_factor: int
    checkpoint: str
    weights: str  # "ema" or "raw"
    sha256: str  # of the checkpoint's file, or of the one that it was converted from

    @property
    def label(self) -> str:
        """The name for names of files."""
        return short_name(self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.weights} weights of {self.checkpoint}, sha256 {self.sha256[:12]}…)"


def build_tokenizer(
    settings: TokenizerSettings, device: torch.device | str = "cpu"
) -> tuple[ImageTokenizer, TokenizerInfo]:
    """The tokenizer of a checkpoint with its weights, frozen, in eval mode, on `device`.

    Raises `UserError` for a file that is not a checkpoint, for flags that contradict what it records, and for one that
    was trained with a user's class, unless that is named: a checkpoint never makes a file of code run.
    """
    path = find_weights(settings.vq_ckpt)
    checkpoint = read_checkpoint(path)
    recorded = published_config(path) | recorded_settings(checkpoint)
    _refuse_contradictions(path, recorded, settings)
    name = settings.vq_model or recorded.get("vq_model", DEFAULT_TOKENIZER)
    if is_component(name) and settings.vq_model is None:
        raise UserError(f"{path} was trained with --vq-model '{name}'; give it.")
    config = {field.name: recorded[field.name] for field in fields(ModelArgs) if field.name in recorded}
    check_fields(config, ModelArgs, path)
    model, identity = new_tokenizer(name, **given_sizes(settings) | config)
    check_sizes(settings, model, identity)
    trained_with = recorded.get("vq_model_identity", identity)
    if placeless(trained_with) != placeless(identity):
        print(f"warning: {path} was trained with {trained_with}, not with {identity}", file=sys.stderr)
    state, kind = select_weights(checkpoint, path, settings.vq_weights)
    load_strict(model, state, path, "check --vq-model, --codebook-size and --codebook-embed-dim.")
    model.requires_grad_(False).eval().to(device)
    info = TokenizerInfo(
        name=identity,
        codebook_size=model.codebook_size,
        codebook_embed_dim=getattr(model, "codebook_embed_dim", None),
        downsample_factor=model.downsample_factor,
        checkpoint=str(path),
        weights=kind,
        sha256=converted_from(checkpoint, state) or fingerprint(path),
    )
    return model, info


def new_tokenizer(name: str, **config) -> tuple[nn.Module, str]:
    """The tokenizer that `--vq-model` names, with new weights, and its identity. `config` are fields of `ModelArgs`.

    A user's class gets those of them that it takes; what its own keywords say goes first. Raises `UserError` if there
    is no such tokenizer.
    """
    if not is_component(name):
        if name not in VQ_models:
            raise UserError(
                f"there is no tokenizer {name}; --vq-model is one of {', '.join(VQ_models)}, "
                "or FILE.py:NAME of a class."
            )
        return VQ_models[name](**config), name
    component = load_component(name, "--vq-model")
    parameters = inspect.signature(component.make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    chosen = getattr(component.make, "keywords", {})
    model = component.make(
        **{key: value for key, value in config.items() if key not in chosen and (takes_all or key in parameters)}
    )
    if not (isinstance(model, nn.Module) and isinstance(model, ImageTokenizer)):
        raise UserError(f"--vq-model {name} is no image tokenizer; tokenizer/base.py says what one offers.")
    return model, component.identity


def given_sizes(settings) -> dict[str, int]:
    """What flags say of the codebook; `settings` may be any that have these fields."""
    sizes = {name: getattr(settings, name) for name in ("codebook_size", "codebook_embed_dim")}
    return {name: value for name, value in sizes.items() if value is not None}


def check_sizes(settings, model: ImageTokenizer, name: str) -> None:
    """Raise `UserError` if a tokenizer that decides about its codes itself has others than the flags say."""
    for field, value in given_sizes(settings).items():
        own = getattr(model, field, None)
        if own != value:
            raise UserError(f"--{field.replace('_', '-')} {value} does not fit {name}, which has {own}; leave it out.")


def check_image_size(size: int, name: str, downsample_factor: int) -> None:
    """Raise `UserError` unless the codes of the tokenizer `name` tile a square of `size` pixels."""
    if size < downsample_factor or size % downsample_factor:
        near = max(1, round(size / downsample_factor)) * downsample_factor
        raise UserError(
            f"--image-size {size} is not a multiple of {downsample_factor}, the pixels per side that a code of {name} "
            f"covers; use {near}."
        )


def _refuse_contradictions(path: Path, recorded: dict, settings: TokenizerSettings) -> None:
    there = {key: recorded[key] for key in ("vq_model", "codebook_size", "codebook_embed_dim") if key in recorded}
    here = given_sizes(settings) | ({"vq_model": settings.vq_model} if settings.vq_model else {})
    if is_component(there.get("vq_model")) and is_component(settings.vq_model):  # the file may have moved
        for side in (there, here):
            side["vq_model"] = call_of(side["vq_model"], "--vq-model")
    as_flags = [{"--" + key.replace("_", "-"): value for key, value in side.items()} for side in (there, here)]
    remedy = "leave these flags out, or choose another checkpoint"
    refuse_differences(f"{path} was trained", *as_flags, remedy)
