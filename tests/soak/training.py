"""Training with averages, validation and sample grids, in a run of twelve steps and four checkpoints."""

from pathlib import Path

import torch

from autoregressive.train import train_c2i
from tests.soak.killing import Subject
from tests.stores import make_store
from tests.tiny_training import command, last_checkpoint, rows, shrink_gpt
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.files import sha256

LEARNED = ("model", "optimizer", "ema", "steps", "skipped_steps", "metrics", "scaler")


def training(folder: Path) -> Subject:
    """`folder` gets what it trains on."""
    torch.manual_seed(0)
    tokenizer = folder / "vq.pt"
    torch.save({"model": VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=8).state_dict()}, tokenizer)
    for name, count, seed in (("codes", 24, 0), ("held-out", 10, 1)):
        make_store(folder / name / "tiny16_codes", count=count, seed=seed, tokenizer_hash=sha256(tokenizer))
    watching = {"--val-code-path": folder / "held-out", "--val-every": 2, "--vq-ckpt": tokenizer, "--sample-every": 4}
    return Subject(
        main=train_c2i.main,
        command=lambda results: command(folder / "codes", results, "--ema", x=watching | {"--log-every": 1}),
        contents=contents,
        prepare=shrink_gpt,
    )


def contents(results: Path) -> dict:
    """Weights, moments, averages and what else an exact continuation needs; the log; the sample grids."""
    checkpoint = last_checkpoint(results)
    found = {name: leaf for key in LEARNED for name, leaf in _leaves(checkpoint[key], key)}
    found |= {f"row {number}": row for number, row in enumerate(rows(results))}
    return found | {path.name: path.read_bytes() for path in (results / "run/samples").iterdir()}


def _leaves(value, name: str):
    """(name, comparable value) of everything in nested dicts and lists of tensors."""
    if isinstance(value, torch.Tensor):
        yield name, value.numpy().tobytes()
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{name}/{key}")
    else:
        yield name, value
