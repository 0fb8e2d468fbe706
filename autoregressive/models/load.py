"""A checkpoint to a model: what the file records builds it, and flags only check.

A file says what it is in up to four ways: the `config` of this program's trainer, the `args` that published files
carry, the catalogue's entry of a published name, and the shapes of its tensors.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.conditioning import Conditioning, LabelEmbedder
from autoregressive.models.gpt import GPT_SIZES, ModelArgs, Transformer, model_args
from pretrained_models.catalogue import find_weights, published_config
from tokenizer.tokenizer_image.load import TokenizerInfo
from utils.checkpoint import (
    WEIGHTS_CHOICES,
    converted_from,
    fingerprint,
    load_strict,
    read_checkpoint,
    recorded_settings,
    select_weights,
)
from utils.component import load_component, placeless
from utils.program import UserError
from utils.recorded import check_fields, damaged
from utils.settings import option, recipe, refuse_contradictions, settings

PUBLISHED_IMAGE_SIZE, PUBLISHED_DOWNSAMPLE_SIZE = 384, 16  # of the published samplers, where nothing else is said


@settings("GPT")
class GPTSettings:
    """The flags that name a trained GPT; those at None are taken from what its checkpoint records."""

    gpt_ckpt: str = option(
        dataclasses.MISSING,
        "weights of the GPT: a checkpoint, a run folder, a name of pretrained_models/README.md, or a folder or "
        "repository (ORG/NAME, ORG/NAME@REVISION) in the form of the Hugging Face hub",
    )
    gpt_model: str | None = recipe(
        None, "size of the GPT (default: as its checkpoint records, else GPT-B)", choices=GPT_SIZES
    )
    gpt_type: str = recipe("c2i", "class-conditional generation", choices=("c2i",))
    from_fsdp: bool = option(
        False,
        "insist that the checkpoint of the GPT is a bare state dict (one is recognised without this flag); names the "
        "result after its folder",
    )
    cls_token_num: int | None = recipe(
        None, "positions of the condition (default: as the checkpoint records, else 1)", at_least=1
    )
    conditioning: str | None = recipe(
        None, "the conditioning that the GPT was trained with, as FILE.py:NAME, if it is one of your own"
    )
    weights: str = recipe(
        "auto",
        "averaged (ema) or raw weights of the GPT; auto: averaged where the file has them",
        choices=WEIGHTS_CHOICES,
    )
    image_size: int | None = recipe(
        None,
        f"pixels per side of the images trained on (default: as the checkpoint records, else {PUBLISHED_IMAGE_SIZE})",
        at_least=1,
    )
    downsample_size: int | None = recipe(
        None,
        f"pixels per side of one code (default: as the checkpoint records, else {PUBLISHED_DOWNSAMPLE_SIZE})",
        at_least=1,
    )
    conditions: str | None = recipe(
        None, "array of conditions (.npy), a row per label, for a --conditioning that takes more than labels"
    )
    num_classes: int | None = recipe(
        None, "classes that the GPT was trained on (default: as its checkpoint records, else 1000)", at_least=1
    )


@dataclass(frozen=True)
class GPTInfo:
    """Which model this is. What the file does not say is None."""

    name: str
    checkpoint: str
    weights: str  # "ema" or "raw"
    steps: int | None
    image_size: int
    downsample_size: int
    grid_known: bool  # the file says for which grid of codes it was trained
    tokenizer: dict  # name, hash and weights (ema or raw) of the one whose codes it was trained on
    class_names: tuple[str, ...] | None
    places: dict[str, str]  # where the images and the tokenizer lay when their codes were extracted
    converted_from: str | None = None  # the SHA-256 of the file that the same weights were converted from

    @property
    def sha256(self) -> str:
        """What identifies the weights: the hash of their file, or of the one that they were converted from."""
        return self.converted_from or fingerprint(self.checkpoint)

    def __str__(self) -> str:
        steps = f" after {self.steps:,} steps" if self.steps is not None else ""
        return f"{self.name} ({self.weights} weights of {self.checkpoint}{steps})"


def build_gpt(
    given: GPTSettings,
    codebook_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Transformer, GPTInfo]:
    """The model that a checkpoint holds, frozen, in eval mode, for use with a tokenizer of `codebook_size` codes.

    Weights go to the device as they are read, as `dtype`; rotary tables stay in float32. Raises `UserError` for a file
    that is not a checkpoint, and for one that holds another model than the settings say.
    """
    path = find_weights(given.gpt_ckpt)
    checkpoint = read_checkpoint(path)
    state, kind = select_weights(checkpoint, path, given.weights)
    if given.from_fsdp and not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise UserError(f"{path} is not a bare state dict as FSDP exports are; leave out --from-fsdp.")
    recorded = published_config(path) | recorded_settings(checkpoint)
    name, args = recorded_model(recorded, state, given, path)
    refuse_contradictions(path, {"codebook_size": args.vocab_size}, {"codebook_size": codebook_size})
    image_size, downsample_size = _sizes(recorded, given)

    model = _empty_model(args, _conditioning(recorded, given, path), dtype, device, path)
    load_strict(model, state, path, "check --gpt-model, --codebook-size and --num-classes.")
    info = GPTInfo(
        name=name,
        checkpoint=str(path),
        weights=kind,
        steps=checkpoint.get("steps"),
        image_size=image_size,
        downsample_size=downsample_size,
        grid_known=recorded_grid(recorded) is not None,
        tokenizer=recorded.get("tokenizer", {}),
        class_names=tuple(recorded["class_names"]) if recorded.get("class_names") else None,
        places=checkpoint.get("places") or {},
        converted_from=converted_from(checkpoint, state),
    )
    return model.requires_grad_(False).eval(), info


def _empty_model(
    args: ModelArgs, conditioning: Callable[[ModelArgs], Conditioning], dtype: torch.dtype, device, path: Path
) -> Transformer:
    """The model whose weights `path` holds, on `device`, before they are loaded."""
    try:
        with torch.device("meta"):
            model = Transformer(args, conditioning)
        model.to(dtype).to_empty(device=device)
        if conditioning is not LabelEmbedder:  # it may hold buffers that no checkpoint has
            model.cls_embedding = conditioning(args).to(dtype=dtype)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    model.set_rope_tables()
    return model.to(device)  # what it moves is the tables, and a conditioning of the user's own


def recorded_model(
    recorded: dict[str, Any], state: dict[str, torch.Tensor], given: GPTSettings, path: Path
) -> tuple[str, ModelArgs]:
    """The model's name and settings: every field that the file records; the rest from its tensors, then from flags."""
    fields = {field.name for field in dataclasses.fields(ModelArgs)}
    if unknown := sorted(recorded.get("model", {}).keys() - fields):
        raise UserError(f"{path} was trained with {unknown[0]}, which this version does not know; update the program.")
    known = {key: value for key, value in recorded.items() if key in fields} | recorded.get("model", {})
    known |= table_sizes(state, known.get("num_classes", given.num_classes), known.get("class_dropout_prob"))
    name = _named(given.gpt_model, recorded.get("gpt_model"), known, state, path)
    flags = {"num_classes": given.num_classes, "cls_token_num": given.cls_token_num}
    refuse_contradictions(path, known, flags)
    grid = _grid(recorded, given, path)
    known |= {key: value for key, value in flags.items() if value is not None}
    size = name if name in GPT_SIZES else "GPT-B"  # then all of its sizes are recorded
    known |= {"grid": grid, "block_size": grid[0] * grid[1]}
    check_fields(known, ModelArgs, path)
    try:
        return name, model_args(size, **known)
    except ValueError as error:
        raise UserError(damaged(path, error)) from error


def check_tokenizer(trained: dict, used: TokenizerInfo, whose: str) -> None:
    """Raise `UserError` unless the tokenizer is the one on whose codes `whose` GPT was trained, as far as is known."""
    if (trained.get("hash") or used.sha256) != used.sha256:
        raise UserError(
            f"{whose} was trained on codes of another tokenizer ({trained.get('name', 'unnamed')}, sha256 "
            f"{trained['hash'][:12]}…) than {used}; give that tokenizer as --vq-ckpt."
        )
    if trained.get("weights") not in (None, used.weights):
        raise UserError(
            f"{whose} was trained on codes of the tokenizer's {trained['weights']} weights, not its {used.weights} "
            f"ones; give --vq-weights {trained['weights']}."
        )


def table_sizes(
    state: dict[str, torch.Tensor], num_classes: int | None, class_dropout_prob: float | None
) -> dict[str, Any]:
    """What the shapes of the embedding tables say: codebook, classes, and whether there is a null class."""
    found: dict[str, Any] = {}
    if (codes := state.get("tok_embeddings.weight")) is not None and codes.dim() == 2:
        found["vocab_size"] = codes.shape[0]
    if (table := state.get("cls_embedding.embedding_table.weight")) is not None and table.dim() == 2:
        rows = table.shape[0]
        found["num_classes"] = num_classes if num_classes in (rows, rows - 1) else rows - 1
        null_class = rows > found["num_classes"]
        found["class_dropout_prob"] = (class_dropout_prob or 0.1) if null_class else 0.0
    return found


def _named(
    given: str | None, recorded: str | None, known: dict[str, Any], state: dict[str, torch.Tensor], path: Path
) -> str:
    """The model's name. Refuses a flag that names another size than the file records or, if it does not, holds."""
    held = recorded or size_of(known, state)
    if given in (None, held) and (held in GPT_SIZES or "dim" in known):
        return held
    if given is None:
        raise UserError(f"{path} holds {held or 'a model of unknown size'}; give --gpt-model, or another checkpoint.")
    if held is not None:
        raise UserError(f"{path} holds {held}, not {given}; give --gpt-model {held} or another checkpoint.")
    return given


def size_of(known: dict[str, Any], state: dict[str, torch.Tensor]) -> str | None:
    """The published size that recorded settings or the tensors' shapes are of, or a description."""
    codes = state.get("tok_embeddings.weight")
    if "dim" in known:
        sizes = (known.get("n_layer"), known.get("n_head"), known["dim"])
        described = "a model of {} layers, {} heads and width {}".format(*sizes)
        return next((name for name, published in GPT_SIZES.items() if published == sizes), described)
    if codes is None or codes.dim() != 2:
        return None
    sizes = len({key.split(".")[1] for key in state if key.startswith("layers.")}), codes.shape[1]
    described = "a model of {} layers and width {}".format(*sizes)
    return next((name for name, (layers, _, width) in GPT_SIZES.items() if (layers, width) == sizes), described)


def _sizes(recorded: dict[str, Any], given: GPTSettings) -> tuple[int, int]:
    return (
        given.image_size or recorded.get("image_size") or PUBLISHED_IMAGE_SIZE,
        given.downsample_size or recorded.get("downsample_size") or PUBLISHED_DOWNSAMPLE_SIZE,
    )


def recorded_grid(recorded: dict[str, Any]) -> tuple[int, int] | None:
    grid = recorded.get("model", recorded).get("grid")
    if grid:
        return tuple(grid)
    if recorded.get("image_size") and recorded.get("downsample_size"):
        return (recorded["image_size"] // recorded["downsample_size"],) * 2
    return None


def _grid(recorded: dict[str, Any], given: GPTSettings, path: Path) -> tuple[int, int]:
    image_size, downsample_size = _sizes(recorded, given)
    if image_size % downsample_size:
        raise UserError(f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}.")
    asked, held = (image_size // downsample_size,) * 2, recorded_grid(recorded)
    if held is not None and held != asked:
        trained = f" (--image-size {recorded['image_size']})" if recorded.get("image_size") else ""
        raise UserError(
            f"{path} was trained on grids of {held[0]}x{held[1]} codes{trained}, not {asked[0]}x{asked[1]}; give the "
            "--image-size and --downsample-size of its training."
        )
    return asked


def _conditioning(recorded: dict[str, Any], given: GPTSettings, path: Path) -> Callable[[ModelArgs], Conditioning]:
    """The module before the image. A user's file runs only if a flag names it, never because a checkpoint does."""
    trained = recorded.get("conditioning")
    if given.conditioning is None:
        if trained is not None:
            spelling = trained.split(" sha256 ")[0]
            raise UserError(f"{path} was trained with another conditioning; give --conditioning '{spelling}'.")
        return LabelEmbedder
    component = load_component(given.conditioning, "--conditioning")
    if placeless(trained or "") != placeless(component.identity):
        held = trained or "class labels"
        print(f"warning: {path} was trained with {held}, not with {component.identity}", file=sys.stderr)
    return component.make
