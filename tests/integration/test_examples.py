"""The examples of docs/extending.md: each idea is one file outside the packages, from training to pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import draw_codes
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from examples.label_smoothing import label_smoothing
from examples.min_p import min_p
from examples.random_sides import random_sides
from tests.processes import run_main
from tests.stores import make_store
from tests.tiny_training import command, last_checkpoint, rows, tiny_store, train
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.files import sha256

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = 24


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 45  # about 40


def test_a_loss(codes, tmp_path):
    flags = {"--loss": f"{EXAMPLES}/label_smoothing.py:label_smoothing(smoothing=0.5)", "--val-code-path": codes}
    assert train(command(codes, tmp_path, x=flags)) == [0]
    assert train(command(codes, tmp_path, x={"--run-name": "plain", "--val-code-path": codes})) == [0]
    smoothed, plain = (last_checkpoint(tmp_path, run)["model"]["output.weight"] for run in ("run", "plain"))
    assert smoothed.norm() < plain.norm()
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"]["loss"].startswith(flags["--loss"])
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randint(5, (2, 3, 1))
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), label_smoothing=0.3
    )
    torch.testing.assert_close(label_smoothing(hidden, weight, targets, smoothing=0.3), expected)


def test_another_loss_is_another_run(codes, tmp_path):
    loss = tmp_path / "mine.py"
    loss.write_text((EXAMPLES / "label_smoothing.py").read_text())
    arguments = command(codes, tmp_path, x={"--loss": f"{loss}:label_smoothing"})
    assert train(arguments) == [0]
    loss.write_text(loss.read_text() + "# changed\n")
    assert train(arguments, output=tmp_path / "log") == [2]
    assert "was trained with other settings: loss (" in (tmp_path / "log").read_text()


def test_a_patch_schedule(codes, tmp_path):
    spelling = f"{EXAMPLES}/random_sides.py:random_sides(sides=(1, 2, 4), seed=3)"
    arguments = command(codes, tmp_path, x={"--patch-schedule": spelling, "--log-every": 6})
    assert train(arguments) == [0]
    sides = [random_sides(step, 12, (1, 2, 4), seed=3) for step in range(12)]
    assert {"loss_1x1", "loss_2x2", "loss_4x4"} & rows(tmp_path)[0].keys() == {f"loss_{s}x{s}" for s in sides[:6]}
    assert all(row[name] == pytest.approx(4.16, abs=0.1) for row in rows(tmp_path) for name in row if "loss" in name)
    assert sides[-1] == 1
    both = command(codes, tmp_path, x={"--patch-schedule": spelling, "--patch-level": 3, "--run-name": "both"})
    assert train(both, output=tmp_path / "log") == [2]
    assert "leave out --patch-level" in (tmp_path / "log").read_text()


@pytest.fixture
def tokenizer(tmp_path):
    torch.save({"model": VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=8).state_dict()}, tmp_path / "vq.pt")
    return {"--vq-model": "VQ-Tiny", "--vq-ckpt": tmp_path / "vq.pt", "--codebook-size": 64}


def test_a_conditioning(tokenizer, tmp_path, monkeypatch, capsys):
    """Trained, its grids drawn, and sampled with guidance; its weights and its length come back from the checkpoint."""
    vq_ckpt = tokenizer["--vq-ckpt"]
    make_store(tmp_path / "codes/tiny16_codes", count=IMAGES, tokenizer_hash=sha256(vq_ckpt))
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(size=(IMAGES, 3, 5)).astype(np.float32))
    conditioning = {
        "--conditioning": f"{EXAMPLES}/embedding_sequence.py:EmbeddingSequence(width=5)",
        "--conditions": tmp_path / "embeddings.npy",
    }
    watching = {"--vq-ckpt": vq_ckpt, "--sample-every": 12, "--val-code-path": tmp_path / "codes"}
    watching |= {"--val-conditions": tmp_path / "embeddings.npy"}
    flags = conditioning | watching | {"--cls-token-num": 3}
    assert train(command(tmp_path / "codes", tmp_path, x=flags)) == [0]
    assert (tmp_path / "run/samples/0000012.png").exists()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint["config"]["model"]["cls_token_num"] == 3
    assert checkpoint["model"]["cls_embedding.null"].shape == (3, 32)

    sampling = tokenizer | {
        "--gpt-ckpt": tmp_path / "run/checkpoints/last.pt",
        "--image-size-eval": 16,
        "--num-fid-samples": IMAGES,
        "--sample-dir": tmp_path / "samples",
        "--cfg-scale": 2.0,
    }
    arguments = [str(word) for pair in sampling.items() for word in pair]
    assert run_main(sample_c2i_ddp.main, arguments, output=tmp_path / "log") == [2]
    assert "was trained with another conditioning; give --conditioning" in (tmp_path / "log").read_text()
    arguments += [str(word) for pair in conditioning.items() for word in pair]
    assert run_main(sample_c2i_ddp.main, arguments, output=tmp_path / "log") == [0]
    with np.load(next((tmp_path / "samples").glob("*.npz"))) as result:
        assert result["arr_0"].shape == (IMAGES, 16, 16, 3)
        assert result["labels"].tolist() == list(range(IMAGES))


def test_a_sampler(tokenizer, codes, tmp_path, monkeypatch):
    torch.manual_seed(0)
    logits, uniforms = torch.randn(100, 50), torch.rand(100, dtype=torch.float64)
    position = torch.tensor([3])
    assert torch.equal(min_p(logits, uniforms, position, threshold=0.0), draw_codes(logits, uniforms))
    assert torch.equal(min_p(logits, uniforms, position, threshold=1.0), logits.argmax(-1))

    args = ModelArgs(n_layer=1, n_head=2, dim=32, vocab_size=64, block_size=16, num_classes=4)
    model = Transformer(args)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    torch.save(
        {
            "model": model.state_dict(),
            "config": {"model": vars(args), "image_size": 16, "downsample_size": 4, "gpt_model": "GPT-Tiny"},
        },
        tmp_path / "gpt.pt",
    )
    pictures = {}
    for name, sampler in (("plain", None), ("min_p", "min_p(threshold=1.0)"), ("again", "min_p(threshold=1.0)")):
        flags = tokenizer | {"--gpt-ckpt": tmp_path / "gpt.pt", "--output": tmp_path / f"{name}.png", "--classes": 1}
        flags |= {"--sampler": f"{EXAMPLES}/min_p.py:{sampler}"} if sampler else {}
        monkeypatch.setattr(sys, "argv", ["sample_c2i", *(str(word) for pair in flags.items() for word in pair)])
        sample_c2i.main()
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["min_p"] == pictures["again"] != pictures["plain"]
