"""What is known of weights, whatever file they are in: all that builds the model again, and what its readers ask."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.conditioning import LabelEmbedder
from autoregressive.models.gpt import GPT_SIZES, Transformer
from autoregressive.models.load import GPTSettings, recorded_grid, recorded_model
from autoregressive.train.config import TrainSettings
from pretrained_models.catalogue import find_weights, published_config
from pretrained_models.provenance import provenance, without_folder
from tokenizer.tokenizer_image import vq_model
from tokenizer.tokenizer_image.load import DEFAULT_TOKENIZER, new_tokenizer
from tokenizer.tokenizer_image.vq_setup import VQTrainSettings
from utils.checkpoint import (
    check_fit,
    content_hash,
    converted_from,
    fingerprint,
    read_checkpoint,
    recorded_settings,
    select_weights,
)
from utils.component import is_component
from utils.program import UserError
from utils.recorded import check_fields

CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class Record:
    """Weights and everything that is recorded of them, in whatever form they were read."""

    path: Path
    state: dict[str, torch.Tensor]
    config: dict[str, Any]  # builds the model again; JSON values
    weights: str  # "ema" or "raw"
    told: dict[str, Any]  # steps, training (the recipe), license and metrics, as far as they are known
    sha256: str  # identifies the weights
    places: dict[str, str]

    @property
    def is_gpt(self) -> bool:
        return is_gpt(self.state)

    def __str__(self) -> str:
        return f"the {self.weights} weights of {self.path}"

    @property
    def about(self) -> dict[str, Any]:
        """What a file says of them beside the configuration."""
        origin = {"sha256": self.sha256, "content": content_hash({"config": self.config}, self.state)}
        return {"weights": self.weights, **self.told, "origin": origin}


def is_gpt(state: dict[str, torch.Tensor]) -> bool:
    return "tok_embeddings.weight" in state


def read_record(name: str, weights: str, **unrecorded: Any) -> Record:
    """The weights that `name` stands for, checked as if they were to be used.

    `unrecorded` are the flags for what a file may leave open: `gpt_model`, `image_size`, `downsample_size`,
    `num_classes` of a GPT, `vq_model` of a tokenizer. Raises `UserError`.
    """
    path = find_weights(name)
    checkpoint = read_checkpoint(path)
    state, kind = select_weights(checkpoint, path, weights)
    recorded = published_config(path) | recorded_settings(checkpoint)
    named = unrecorded.pop("vq_model", None)
    if is_gpt(state):
        config, program = _gpt_config(recorded, state, GPTSettings(str(path), **unrecorded), path), TrainSettings
    else:
        config, program = _tokenizer_config(recorded, state, named, path), VQTrainSettings
    places = checkpoint.get("places")
    return Record(
        path=path,
        state=state,
        config=json.loads(json.dumps(config)),
        weights=kind,
        told=provenance(checkpoint, path, program),
        sha256=converted_from(checkpoint, state) or fingerprint(path),
        places=places if isinstance(places, dict) else {},
    )


def _gpt_config(recorded: dict, state: dict[str, torch.Tensor], given: GPTSettings, path: Path) -> dict[str, Any]:
    if recorded_grid(recorded) is None and None in (given.image_size, given.downsample_size):
        raise UserError(f"{path} does not say on which images it was trained; give --image-size and --downsample-size.")
    name, args = recorded_model(recorded, state, given, path)
    conditioning = without_folder(recorded.get("conditioning"))
    if conditioning is None:
        with torch.device("meta"):
            model = Transformer(args, LabelEmbedder)
        check_fit(model, state, path, "check --gpt-model and --num-classes.")
    return {
        "model": asdict(args),
        "gpt_model": recorded.get("gpt_model") or (name if name in GPT_SIZES else None),
        "image_size": given.image_size or recorded.get("image_size"),
        "downsample_size": given.downsample_size or recorded.get("downsample_size"),
        "conditioning": conditioning,
        "tokenizer": {key: without_folder(value) for key, value in (recorded.get("tokenizer") or {}).items()},
        "class_names": recorded.get("class_names"),
    }


def _tokenizer_config(recorded: dict, state: dict[str, torch.Tensor], named: str | None, path: Path) -> dict[str, Any]:
    """A tokenizer of the user's own is taken as it is: its code does not run."""
    name = named or recorded.get("vq_model", DEFAULT_TOKENIZER)
    known = {field.name: recorded[field.name] for field in fields(vq_model.ModelArgs) if field.name in recorded}
    about = {"image_size": recorded.get("image_size")}
    if is_component(name):
        identity = without_folder(recorded.get("vq_model_identity"))
        return known | about | {"vq_model": without_folder(name), "vq_model_identity": identity}
    if CODEBOOK not in state:
        raise UserError(f"{path} holds neither a GPT nor a tokenizer that is known here (docs/hub.md).")
    check_fields(known, vq_model.ModelArgs, path)
    known |= dict(zip(("codebook_size", "codebook_embed_dim"), state[CODEBOOK].shape, strict=True))
    with torch.device("meta"):
        model, identity = new_tokenizer(name, **known)
    check_fit(model, state, path, "check --vq-model.")
    return asdict(model.config) | about | {"vq_model": name, "vq_model_identity": identity}


def metrics_of(report: Path | None) -> dict[str, Any] | None:
    """The metrics of an evaluator's report, and of how many images against what."""
    if report is None:
        return None
    try:
        contents = json.loads(report.read_text())
        metrics = dict(contents["metrics"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} is no report of the evaluator; give the SAMPLE.json that it wrote.") from error
    for name in ("sample", "reference"):
        if isinstance(contents.get(name), dict):
            metrics |= {f"{name}_{key}": contents[name][key] for key in ("name", "count") if key in contents[name]}
    return metrics
