"""A folder in the form of the Hugging Face hub: `model.safetensors`, `config.json` and a model card, `README.md`."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import CONFIG, EXPORT, TOKENIZER_FOLDER, WEIGHTS
from utils.files import atomic_file, write_json
from utils.weight_files import safetensors_library, write_safetensors

CARD = "README.md"
CODE = "Next Patch Prediction, an open implementation"  # as CITATION.cff has it
PAPERS = {"next patch prediction": "2412.15321", "LlamaGen, whose architecture it has": "2406.06525"}
USE = """```python
from autoregressive.sample.pipeline import Pipeline

pipeline = Pipeline.from_pretrained("{name}"{tokenizer})
images = pipeline([0, 1], seed=0, cfg_scale=2.0)
```"""
USE_TOKENIZER = """```python
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer

tokenizer, info = build_tokenizer(TokenizerSettings(vq_ckpt="{name}"))
```"""


def write_hub_form(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], exported: dict[str, Any], name: str = ""
) -> None:
    """Write weights, every tensor as it is, with `config`, which builds the model again, and what was `exported`.

    `exported`: `weights` (ema or raw), `steps`, `training` (the recipe), `code` (version), `metrics`, `license`,
    `origin`. `config.json` comes last: a folder without it is not complete. `name`: the model card's heading.
    """
    safetensors_library()  # says what to install before there is a folder
    folder.mkdir(parents=True, exist_ok=True)
    if not is_gpt(config):
        remove_tokenizer(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    with atomic_file(folder / WEIGHTS) as file:
        write_safetensors(file.name, state)
    with atomic_file(folder / CARD, "w") as file:
        file.write(model_card(config, exported, name or folder.name, (folder / TOKENIZER_FOLDER).is_dir()))
    write_json(folder / CONFIG, config | {EXPORT: exported})


def remove_tokenizer(folder: Path) -> None:
    """Remove the tokenizer that lies in a GPT's `folder`, if there is one: other weights take its place."""
    for name in (CONFIG, WEIGHTS, CARD):
        (folder / TOKENIZER_FOLDER / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files, or is not there
        (folder / TOKENIZER_FOLDER).rmdir()


def is_gpt(config: dict[str, Any]) -> bool:
    return "gpt_model" in config


def model_card(config: dict[str, Any], exported: dict[str, Any], name: str, with_tokenizer: bool) -> str:
    """What a reader of the repository must know: what it is, how it was made, how good it is, what is allowed."""
    head = {
        "license": exported.get("license"),
        "library_name": "next-patch-prediction",
        "pipeline_tag": "unconditional-image-generation" if is_gpt(config) else None,
        "tags": ["image-generation", "autoregressive", "next-patch-prediction", "model_hub_mixin"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value), "---", f"# {name}", ""]
    lines += [_description(config, exported), "", "## Use", ""]
    given = "" if with_tokenizer else ', tokenizer="TOKENIZER"'
    lines += [(USE if is_gpt(config) else USE_TOKENIZER).format(name=name, tokenizer=given), ""]
    lines += ["## Training", "", *_table(exported.get("training"), "Not recorded."), ""]
    lines += ["## Metrics", "", *_table(exported.get("metrics"), "Not known."), ""]
    lines += ["## Code and papers", "", f"Written by version {exported.get('code') or 'unknown'} of *{CODE}*.", ""]
    lines += [f"- {title}: [arXiv {number}](https://arxiv.org/abs/{number})" for title, number in PAPERS.items()]
    return "\n".join(lines) + f"\n\nLicence: {exported.get('license') or 'not stated'}.\n"


def _description(config: dict[str, Any], exported: dict[str, Any]) -> str:
    weights = {"ema": "averaged (EMA) weights", "raw": "weights"}[exported["weights"]]
    steps = f" after {exported['steps']:,} steps of training" if exported.get("steps") is not None else ""
    if not is_gpt(config):
        return f"The {weights} of an image tokenizer, {config.get('vq_model')}{steps}: images to codes and back."
    model, tokenizer = config["model"], config.get("tokenizer") or {}
    size = f", images of {config['image_size']} px" if config.get("image_size") else ""
    codes = f" Its codes are those of {tokenizer['name']}." if tokenizer.get("name") else ""
    return (
        f"The {weights} of {config['gpt_model'] or 'a GPT'}{steps}, which draws images of {model['num_classes']:,} "
        f"classes as {' x '.join(map(str, model['grid']))} codes{size}.{codes}"
    )


def _table(values: dict[str, Any] | None, otherwise: str) -> list[str]:
    rows = [f"| {name} | {json.dumps(value)} |" for name, value in (values or {}).items()]
    return ["| setting | value |", "|---|---|", *rows] if rows else [otherwise]
