"""The tiny GPT of tests/golden, for every test that needs it."""

from pathlib import Path

import numpy as np
import torch

from autoregressive.models.gpt import ModelArgs, Transformer

GOLDEN = Path(__file__).parent / "golden"


def golden_args(**settings) -> ModelArgs:
    defaults = dict(
        n_layer=3,
        n_head=4,
        dim=64,
        vocab_size=96,
        block_size=64,
        num_classes=10,
        multiple_of=32,
        token_dropout_p=0.0,
        resid_dropout_p=0.0,
        ffn_dropout_p=0.0,
    )
    return ModelArgs(**defaults | settings)


def golden_model(**settings) -> Transformer:
    model = Transformer(golden_args(**settings))
    model.load_state_dict(torch.load(GOLDEN / "gpt_tiny.pt", weights_only=True)["model"], strict=True)
    return model


def golden_figures() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "gpt_tiny.npz") as figures:
        return dict(figures)
