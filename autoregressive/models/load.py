"""Building a trained GPT from a file, in one place, and saying which model the file holds.

A file says what it is in up to four ways: the `config` dict of this program's trainer, the `args` that published
files carry, the catalogue's entry of a published name, and the shapes of its tensors. Whatever is known must agree with
the flags.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.gpt import GPT_SIZES, GPT_models, Transformer
from pretrained_models.catalogue import published_config
from utils.checkpoint import load_strict, read_checkpoint, recorded_settings, select_weights
from utils.program import UserError


@dataclass(frozen=True)
class GPTInfo:
    """Which model this is. What the file does not say is None."""

    name: str
    checkpoint: str
    weights: str  # "ema" or "raw"
    steps: int | None
    grid_known: bool  # the file says for which grid of codes it was trained
    tokenizer: dict  # name, hash and weights (ema or raw) of the one whose codes it was trained on
    class_names: tuple[str, ...] | None

    def __str__(self) -> str:
        steps = f" after {self.steps:,} steps" if self.steps is not None else ""
        return f"{self.name} ({self.weights} weights of {self.checkpoint}{steps})"


def build_gpt(
    name: str,
    checkpoint_path: str | Path,
    *,
    grid: tuple[int, int],
    num_classes: int = 1000,
    vocab_size: int = 16384,
    weights: str = "auto",
    from_fsdp: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Transformer, GPTInfo]:
    """The model `name` of `GPT_models` for a `grid` of codes with the file's weights, frozen, in eval mode.

    `weights` is one of `utils.checkpoint.WEIGHTS_CHOICES`; `from_fsdp` insists on a bare state dict. Weights go to the
    device as they are read, as `dtype`; rotary tables stay in float32. Raises `UserError` for a file that is not a
    checkpoint, and for one that holds another model than the arguments say.
    """
    if name not in GPT_models:
        raise UserError(f"there is no model {name}; --gpt-model is one of {', '.join(GPT_models)}.")
    checkpoint = read_checkpoint(checkpoint_path)
    state, kind = select_weights(checkpoint, checkpoint_path, weights)
    if from_fsdp and not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise UserError(f"{checkpoint_path} is not a bare state dict as FSDP exports are; leave out --from-fsdp.")
    config = with_grid(published_config(checkpoint_path) | recorded_settings(checkpoint))
    wanted = {"gpt_model": name, "num_classes": num_classes, "vocab_size": vocab_size, "grid": tuple(grid)}
    _refuse_contradictions(wanted, config | _shapes(state), checkpoint_path)

    with torch.device("meta"):
        unusual = {key: config[key] for key in ("n_kv_head", "multiple_of", "rope_base", "norm_eps") if key in config}
        model = GPT_models[name](
            vocab_size=vocab_size,
            num_classes=num_classes,
            block_size=grid[0] * grid[1],
            grid=tuple(grid),
            class_dropout_prob=0.1 if _has_null_class(state, num_classes) else 0.0,
            **unusual,
        )
    model.to(dtype).to_empty(device=device)
    model.set_rope_tables()
    model.to(device)  # what it moves is these tables alone
    load_strict(model, state, checkpoint_path, "check --gpt-model, --vocab-size and --num-classes.")
    info = GPTInfo(
        name=name,
        checkpoint=str(checkpoint_path),
        weights=kind,
        steps=checkpoint.get("steps"),
        grid_known="grid" in config,
        tokenizer=config.get("tokenizer", {}),
        class_names=tuple(config["class_names"]) if config.get("class_names") else None,
    )
    return model.requires_grad_(False).eval(), info


def with_grid(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training, with the `grid` of codes worked out where they say enough."""
    if config.get("grid"):
        return config | {"grid": tuple(config["grid"])}
    if config.get("image_size") and config.get("downsample_size"):
        return config | {"grid": (config["image_size"] // config["downsample_size"],) * 2}
    return config


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the tensors themselves say: vocabulary and, where the size is one of ours, the model."""
    known: dict[str, Any] = {}
    embeddings = state.get("tok_embeddings.weight")
    if embeddings is not None and embeddings.dim() == 2:
        known["vocab_size"], width = embeddings.shape
        layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
        known["gpt_model"] = next(
            (name for name, (n_layer, _, dim) in GPT_SIZES.items() if (n_layer, dim) == (layers, width)),
            f"a model of {layers} layers and width {width}",
        )
    classes = state.get("cls_embedding.embedding_table.weight")
    if classes is not None and classes.dim() == 2:
        known["class_rows"] = classes.shape[0]
    return known


def _has_null_class(state: dict[str, torch.Tensor], num_classes: int) -> bool:
    table = state.get("cls_embedding.embedding_table.weight")
    return table is None or table.shape[0] != num_classes


def _refuse_contradictions(wanted: dict[str, Any], known: dict[str, Any], path: str | Path) -> None:
    rows, classes = known.get("class_rows"), wanted["num_classes"]
    if rows is not None and rows not in (classes, classes + 1):
        known = known | {"num_classes": known.get("num_classes", rows - 1)}
    for key, value in wanted.items():
        if known.get(key, value) == value:
            continue
        if key == "grid":
            held, asked = ("x".join(map(str, grid)) for grid in (known["grid"], value))
            trained = f" (--image-size {known['image_size']})" if known.get("image_size") else ""
            raise UserError(f"{path} was trained on grids of {held} codes{trained}, not {asked}; give the --image-size "
                            "and --downsample-size of its training.")  # fmt: skip
        option = {"gpt_model": "--gpt-model", "num_classes": "--num-classes", "vocab_size": "--codebook-size"}[key]
        says = "holds" if key == "gpt_model" else f"was trained with {option}"
        raise UserError(f"{path} {says} {known[key]}, not {value}; give {option} {known[key]} or another checkpoint.")
