"""Training a tokenizer: exact resume, any world, a discriminator that starts on time, weights alone, refusals."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.image_batches import RandomViews, random_view_batches
from dataset.image_folder import list_image_folder
from dataset.order import BatchOrder
from tests.tiny_tokenizer import command, smaller_discriminator, smaller_tokenizer, tiny_images, train
from tests.tiny_training import assert_same_state, interrupting, last_checkpoint, rows, send
from tokenizer.tokenizer_image import vq_model
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_loss import PatchDiscriminator
from tokenizer.tokenizer_image.vq_train import Validation, revive_dead_codes
from utils.distributed import World
from utils.engine.state import EMA, Trained

ALONE = World(0, 1, 0, torch.device("cpu"))
LEARNED = ("model", "ema", "optimizer", "discriminator", "optimizer_disc", "steps", "skipped_steps", "metrics")
GENTLE = {"--lr": 1e-4}  # Adam multiplies rounding errors of small gradients by the learning rate
EVERYTHING = {"--entropy-loss-ratio": 0.1, "--revive-dead-codes": 4, "--dropout-p": 0.1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    results = tmp_path_factory.mktemp("uninterrupted")
    assert train(command(images, results, "--ema", "--disc-adaptive-weight", more=EVERYTHING)) == [0]
    return results


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    results = tmp_path_factory.mktemp("alone")
    assert train(command(images, results, "--ema", "--disc-adaptive-weight", more=GENTLE)) == [0]
    return results


def checkpoint(results, step: int) -> dict:
    return torch.load(results / f"run/checkpoints/{step:07d}.pt", weights_only=True)


def test_adversarial_training_stays_finite_and_learns(uninterrupted):
    before, after = (rows(uninterrupted)[:3], rows(uninterrupted)[3:])
    assert not any("generator" in row or "discriminator" in row for row in before)
    assert all(np.isfinite([row["generator"], row["discriminator"], row["adaptive_weight"]]).all() for row in after)
    assert after[-1]["skipped_steps"] == 0
    assert after[-1]["reconstruction"] < 0.7 * before[0]["reconstruction"]
    assert all(0 < row["code_usage"] <= 1 and row["perplexity"] >= 1 for row in before + after)


def test_discriminator_is_untouched_before_its_start(uninterrupted):
    at_start, late = (checkpoint(uninterrupted, step) for step in (6, 12))
    torch.manual_seed(0 + 1)
    fresh = smaller_discriminator().state_dict()
    assert_same_state(dict(at_start["discriminator"]), dict(fresh))
    assert all((state["step"] == 0).all() for state in at_start["optimizer_disc"]["state"].values())
    assert not torch.equal(late["discriminator"]["main.0.weight"], fresh["main.0.weight"])


def test_discriminator_costs_nothing_before_its_start(images, tmp_path):
    def forbid():
        PatchDiscriminator.forward = lambda *_: exec("raise SystemExit(7)")

    def stop():
        forbid()
        interrupting(6, lambda: exec("raise SystemExit(9)"))()

    assert train(command(images, tmp_path / "a"), before=stop) == [9]
    assert train(command(images, tmp_path / "b"), before=forbid) == [7]


@pytest.mark.parametrize("at", [2, 5, 6, 7])
def test_kill_and_resume_is_bit_exact(at, images, uninterrupted, tmp_path):
    arguments = command(images, tmp_path, "--ema", "--disc-adaptive-weight", more=EVERYTHING | {"--ckpt-every": 1})
    assert train(arguments, before=interrupting(at, send(signal.SIGKILL))) == [-signal.SIGKILL]
    assert train(arguments) == [0]
    ours, theirs = last_checkpoint(tmp_path), last_checkpoint(uninterrupted)
    for key in LEARNED:
        assert_same_state(ours[key], theirs[key], key)
    assert rows(tmp_path) == rows(uninterrupted)


def test_sigterm_saves_and_stops_and_workers_outlive_it(images, uninterrupted, tmp_path):
    def signal_everyone():  # as a batch system does
        os.killpg(0, signal.SIGTERM)

    def alone_in_its_group():
        os.setpgrp()
        interrupting(5, signal_everyone)()

    more = EVERYTHING | {"--num-workers": 1}
    arguments = command(images, tmp_path, "--ema", "--disc-adaptive-weight", more=more)
    assert train(arguments, before=alone_in_its_group) == [143]
    assert last_checkpoint(tmp_path)["steps"] == 5
    assert train(arguments) == [0]
    assert_same_state(last_checkpoint(tmp_path)["model"], last_checkpoint(uninterrupted)["model"])


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_change_nothing(processes, micro_batches, images, alone, tmp_path):
    flags = ["--ema"] + (["--disc-adaptive-weight"] if micro_batches == 1 else [])
    expected = alone
    if micro_batches > 1:  # the adaptive weight is one a micro-batch: compare with the fixed one
        expected = tmp_path / "expected"
        assert train(command(images, expected, "--ema", more=GENTLE)) == [0]
    more = GENTLE | {"--gradient-accumulation-steps": micro_batches}
    assert train(command(images, tmp_path / "run", *flags, more=more), processes) == [0] * processes
    for mine, theirs in zip(rows(tmp_path / "run"), rows(expected), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for key in ("model", "ema", "discriminator"):
        assert_same_state(last_checkpoint(tmp_path / "run")[key], last_checkpoint(expected)[key], key, 1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision, images, tmp_path):
    more = {"--mixed-precision": precision, "--disc-start": 1, "--epochs": 1, "--decay-ratio": 0, "--log-every": 1}
    assert train(command(images, tmp_path, "--disc-adaptive-weight", more=more)) == [0]
    last = rows(tmp_path)[-1]
    assert np.isfinite([last["reconstruction"], last["generator"], last["discriminator"]]).all()
    assert last["skipped_steps"] <= 2  # the loss scale may start too high


def test_two_processes_resume_bit_exactly(images, tmp_path):
    """Moments must come back in their parameters' memory format, which fused optimizers rely on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = EVERYTHING | {"--ckpt-every": 4}
    assert train(command(images, whole, "--ema", more=more), 2) == [0, 0]
    stop = interrupting(9, lambda: exec("raise SystemExit(9)"))
    assert train(command(images, parts, "--ema", more=more), 2, before=stop) == [9, 9]
    assert train(command(images, parts, "--ema", more=more), 2) == [0, 0]
    for key in LEARNED:
        assert_same_state(last_checkpoint(parts)[key], last_checkpoint(whole)[key], key)
    assert rows(parts) == rows(whole)


def test_the_checkpoint_is_read_by_every_later_step(alone, monkeypatch):
    monkeypatch.setitem(vq_model.VQ_models, "VQ-Tiny", smaller_tokenizer)
    path = alone / "run/checkpoints/0000012.pt"
    for weights in ("ema", "raw"):
        model, info = build_tokenizer(TokenizerSettings(str(path), vq_weights=weights))
        assert info.weights == weights
        name = "encoder.conv_in.weight"
        saved = last_checkpoint(alone)["model" if weights == "raw" else "ema"]
        assert torch.equal(model.state_dict()[name], saved[name])


def test_weights_alone_start_a_new_run(images, alone, tmp_path):
    torch.save(last_checkpoint(alone)["model"], tmp_path / "bare.pt")
    no_steps = {"--lr": 0, "--end-lr": 0, "--epochs": 2, "--init-from": tmp_path / "bare.pt"}
    assert train(command(images, tmp_path, more=no_steps), output=tmp_path / "log") == [0]
    assert "starting from the raw weights" in (tmp_path / "log").read_text()
    assert_same_state(last_checkpoint(tmp_path)["model"], last_checkpoint(alone)["model"])
    published = {"--vq-ckpt": tmp_path / "bare.pt", "--run-name": "finetune", "--lr": 0, "--end-lr": 0, "--epochs": 2}
    assert train(command(images, tmp_path, "--finetune", more=published)) == [0]
    assert_same_state(last_checkpoint(tmp_path, "finetune")["model"], last_checkpoint(alone)["model"])


@pytest.mark.parametrize(("flags", "lacks"), [(("--ema",), "ema"), ((), "discriminator")])
def test_a_checkpoint_without_all_that_learns_is_not_continued(flags, lacks, images, tmp_path):
    other = command(images, tmp_path / "other", more={"--disc-start": 20000, "--epochs": 2})
    assert train(other) == [0]
    path = tmp_path / "other/run/checkpoints/last.pt"
    more = {"--resume": path, "--disc-weight": 0 if flags else 0.5}
    assert train(command(images, tmp_path / "results", *flags, more=more), output=tmp_path / "log") == [2]
    said = (tmp_path / "log").read_text()
    assert f"holds no {lacks}, so training cannot continue" in said
    assert "Traceback" not in said


def test_the_published_size_of_the_discriminator(images, tmp_path):
    more = {"--disc-type": "patchgan", "--disc-dim": 128, "--disc-num-layers": 2, "--dataset": "imagenet"}
    assert train(command(images, tmp_path, more=more | {"--epochs": 2, "--disc-start": 1})) == [0]
    weights = last_checkpoint(tmp_path)["discriminator"]
    assert weights["main.0.weight"].shape[0] == 32  # a quarter of it: tests/tiny_tokenizer.py
    assert sum(name.endswith("weight") and value.dim() == 4 for name, value in weights.items()) == 4


def test_validation_scores_and_pictures_change_nothing(images, uninterrupted, tmp_path):
    more = EVERYTHING | {"--val-data-path": images, "--val-every": 5}
    assert train(command(images, tmp_path, "--ema", "--disc-adaptive-weight", more=more)) == [0]
    assert_same_state(last_checkpoint(tmp_path)["model"], last_checkpoint(uninterrupted)["model"])
    scores = [row for row in rows(tmp_path) if "val_psnr" in row]
    assert [row["step"] for row in scores] == [5, 10, 12]
    with Image.open(tmp_path / "run/samples/0000012.png") as picture:
        assert picture.height < picture.width


@pytest.mark.parametrize("at", [5, 12])
def test_a_validation_that_a_kill_prevented_is_made_up_for(at, images, tmp_path):
    more = {"--val-data-path": images, "--val-every": 5, "--ckpt-every": 5, "--disc-weight": 0}
    assert train(command(images, tmp_path / "whole", "--ema", more=more)) == [0]

    def stop_before_validation():
        original = Validation.validate

        def validate(self, steps_done):
            if steps_done == at:
                self.training._writer.wait()
                raise SystemExit(9)
            original(self, steps_done)

        Validation.validate = validate

    arguments = command(images, tmp_path / "parts", "--ema", more=more)
    assert train(arguments, before=stop_before_validation) == [9]
    for _ in range(2):  # the second time nothing is left to do
        assert train(arguments) == [0]
        assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_views_depend_on_epoch_and_image_alone(images):
    folder = list_image_folder(images)
    views = RandomViews(folder, 32, seed=3, mirror=True)
    order = BatchOrder(24, 8)
    batches = random_view_batches(views, order, 0, 0, ALONE)
    steps = [next(batches) for _ in range(7)]
    again = random_view_batches(views, order, 4, 1, ALONE)
    assert all(torch.equal(next(again), batch) for batch in steps[4:])
    shares = [
        next(random_view_batches(views, BatchOrder(24, 8, rank, 2), 5, 0, World(rank, 2, 0, ALONE.device)))
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(shares), steps[5])
    assert not torch.equal(views.view(0, 1), views.view(1, 1))
    upright = RandomViews(folder, 32, seed=3, mirror=False)
    mirrored = [not torch.equal(views.view(0, image), upright.view(0, image)) for image in range(24)]
    assert 4 < sum(mirrored) < 20


def test_dead_codes_move_onto_encoder_outputs():
    torch.manual_seed(0)
    model = vq_model.VQ_models["VQ-Tiny"](codebook_size=32, codebook_embed_dim=4)
    weight = model.quantize.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[weight] = {name: torch.ones_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    trained = Trained(model, optimizer, EMA(model, 0.9))
    before = weight.detach().clone()
    used = torch.arange(32) < 20
    model.quantize.codebook_used[:32] = used.float()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    revive_dead_codes(trained, images, ALONE)
    assert torch.equal(weight[used], before[used])
    with torch.no_grad():
        outputs = torch.nn.functional.normalize(model.latent(images), dim=1).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.cdist(weight[~used], outputs).min(dim=1).values.max() < 1e-3
    assert (optimizer.state[weight]["exp_avg"].sum(dim=1) == 4 * used).all()
    average = next(a for p, a in zip(trained.ema.parameters, trained.ema.averages, strict=True) if p is weight)
    assert torch.equal(average, weight)
    assert (model.quantize.codebook_used == 0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--image-size": 34}, "not a multiple of 4"),
        ({"--image-size": 16}, "at least 32 pixels"),
        ({"--image-size": 2**40}, "--image-size must be at least 1 and at most 16384, got 1099511627776"),
        ({"--epochs": 2**50}, "are 3,377,699,720,527,872 steps, above 100,000,000; lower it"),
        ({"--disc-num-layers": 4}, "at least 64 pixels"),
        ({"--disc-num-layers": 0}, "--disc-num-layers must be at least 1"),
        ({"--disc-dim": 40}, "--disc-dim must be a multiple of 16"),
        ({"--disc-type": "stylegan"}, "invalid choice: 'stylegan'"),
        ({"--dropout-p": 1}, "--dropout-p must be at least 0 and below 1"),
        ({"--image-size": 8, "--disc-weight": 0, "--perceptual-weight": 1}, "LPIPS compares images of at least 16"),
        ({"--image-size": 8, "--disc-weight": 0, "--val-data-path": "/nowhere"}, "SSIM compares images of at least 11"),
        ({"--data-path": "/nowhere"}, "there is no folder"),
        ({"--global-batch-size": 0}, "--global-batch-size must be at least 1"),
        ({"--global-batch-size": 25}, "a batch must fit the data"),
        ({"--init-from": "/nowhere.pt"}, "there is no checkpoint"),
        ({"--resume": "/nowhere.pt"}, "there is no checkpoint"),
        ({"--codebook-size": 0}, "--codebook-size must be at least 1"),
        ({"--codebook-size": 10**14}, "training a codebook of 400,000,000,000,000 numbers takes 5.7 PiB of memory"),
        ({"--disc-start": -1}, "--disc-start must be at least 0"),
        (
            {"--perceptual-weight": 1, "--lpips-vgg-path": "/nowhere", "--lpips-linear-path": "/nowhere"},
            "no checkpoint",
        ),
        ({"--decay-ratio": 0.9}, "lower one of them"),
    ],
    ids=str,
)
def test_refusals(change, sentence, images, tmp_path):
    assert train(command(images, tmp_path / "results", more=change), output=tmp_path / "log") == [2]
    said = (tmp_path / "log").read_text()
    assert sentence in said
    assert "Traceback" not in said


def test_refuses_broken_images_and_other_models(images, alone, tmp_path):
    folder = tiny_images(tmp_path / "images", 8)
    (folder / "class_0/00.png").write_bytes(b"not an image")
    assert train(command(folder, tmp_path / "a"), output=tmp_path / "log") == [2]
    assert "cannot be read as an image" in (tmp_path / "log").read_text()
    other = {"--init-from": alone / "run/checkpoints/0000012.pt", "--codebook-size": 32}
    assert train(command(images, tmp_path / "b", more=other), output=tmp_path / "log2") == [2]
    assert "does not fit this model" in (tmp_path / "log2").read_text()


def test_other_images_and_other_first_weights_are_another_run(images, alone, tmp_path):
    """Known by what they are: the number of images and the name of a file may be the same."""
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(alone / "run", tmp_path / "results/run")
    (tmp_path / "images/class_0/00.png").rename(tmp_path / "images/class_0/zero.png")
    arguments = command(tmp_path / "images", tmp_path / "results", "--ema", "--disc-adaptive-weight", more=GENTLE)
    assert train(arguments, output=tmp_path / "log") == [2]
    assert "with other settings: image list (" in (tmp_path / "log").read_text()
    weights = tmp_path / "weights.pt"
    for number in range(2):
        torch.save({"model": last_checkpoint(alone)["model"], "number": number}, weights)
        more = {"--init-from": weights, "--epochs": 2, "--disc-weight": 0}
        expected = [2 * number]
        assert train(command(images, tmp_path / "from", more=more), output=tmp_path / "log2") == expected
    assert "with other settings: init_from (sha256 " in (tmp_path / "log2").read_text()
    config = tmp_path / "from/run/config.json"
    assert json.loads(config.read_text())["recipe"]["init_from"] == str(weights)  # as runs of earlier versions have it


def test_a_training_that_diverges_is_not_trained(images, tmp_path):
    more = {"--lr": 1e30, "--warmup-epochs": 0, "--max-grad-norm": 0, "--disc-weight": 0}
    assert train(command(images, tmp_path, more=more), output=tmp_path / "log") == [2]
    assert "training has diverged; use" in (tmp_path / "log").read_text()
    assert "trained:" not in (tmp_path / "log").read_text()


def test_a_start_after_the_end_is_announced(images, tmp_path):
    more = {"--disc-start": 20000, "--epochs": 2}
    assert train(command(images, tmp_path, more=more), output=tmp_path / "log") == [0]
    assert "no adversarial loss" in (tmp_path / "log").read_text()
    assert "discriminator" not in last_checkpoint(tmp_path)
