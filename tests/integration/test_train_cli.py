"""The GPT trainer's command line: the published one, what it prints and writes, and what it refuses."""

import argparse
import itertools
import json
import os
import signal
import time

import pytest
import torch
from PIL import Image

from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train import train_c2i
from autoregressive.train.monitor import Monitor
from tests.processes import fork, run_main, wait
from tests.stores import make_store
from tests.tiny_training import NO_DROPOUT, assert_same_state, command, last_checkpoint, rows, tiny_store, train
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import read_checkpoint
from utils.files import sha256

TINY = dict(n_layer=2, n_head=2, dim=32, vocab_size=64, block_size=16, num_classes=4)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


def refusal(arguments, tmp_path, world_size=1) -> str:
    """The one sentence a refused command ends with; asserts status 2, no traceback, and no file of a run."""
    log = tmp_path / "log"
    assert set(train(arguments, world_size, log)) == {2}
    text = log.read_text()
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("*.pt"))
    lines = text.strip().splitlines()
    sentence = lines[-1] if world_size == 1 else next(line for line in lines if "error: " in line)
    assert "error: " in sentence  # PyTorch's own warnings of a rank that has gone may follow where there are two
    return sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--code-path": "nowhere"}, "there is no folder nowhere"),
        ({"--image-size": 32}, "holds codes of tiny at image size 16, not 32; use --image-size 16"),
        ({"--downsample-size": 2}, "use --downsample-size 4"),
        ({"--downsample-size": 3}, "--image-size 16 is not a multiple of --downsample-size 3"),
        ({"--vocab-size": 16384}, "use --vocab-size 64"),
        ({"--num-classes": 1000}, "holds 4 classes, not 1000; use --num-classes 4"),
        (
            {"--patch-level": 4, "--epochs": 16},
            "8x8 patches, which do not tile the grid of 4x4 codes; use --patch-level 3",
        ),
        ({"--epochs": 1}, "would get no epoch"),
        ({"--warmup-epochs": 3}, "less than --warmup-epochs 3"),
        ({"--global-batch-size": 100}, "must hold at least one batch"),
        ({"--gradient-accumulation-steps": 3}, "does not divide"),
        ({"--global-batch-size": 0}, "--global-batch-size must be at least 1"),
        ({"--downsample-size": 0}, "--downsample-size must be at least 1"),
        ({"--val-every": 0}, "--val-every must be at least 1"),
        ({"--dropout-p": 2}, "--dropout-p must be at least 0 and below 1"),
        ({"--lr": -1}, "--lr must be at least 0"),
        ({"--init-from": "missing.pt"}, "there is no checkpoint missing.pt"),
        ({"--resume": "missing.pt"}, "there is no checkpoint missing.pt"),
        ({"--gpt-ckpt": "missing.pt"}, "there is no checkpoint missing.pt"),
        ({"--keep-last": 1}, "--keep-last must be at least 2"),
        ({"--log-every": 0}, "--log-every must be at least 1"),
        ({"--val-code-path": "nowhere"}, "there is no folder nowhere"),
        ({"--vq-ckpt": "missing.pt"}, "there is no checkpoint missing.pt"),
        ({"--gpt-type": "t2i"}, "invalid choice"),
        ({"--cls-token-num": 2}, "--cls-token-num above 1 needs a --conditioning"),
        ({"--gpt-model": "GPT-Z"}, "invalid choice"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, message, codes, tmp_path):
    assert message in refusal(command(codes, tmp_path, changes=changes), tmp_path)


def test_refusals_of_flags_together(codes, tmp_path):
    assert "--no-local-save needs --cloud-save-path" in refusal(command(codes, tmp_path, "--no-local-save"), tmp_path)
    both = command(codes, tmp_path, x={"--resume": "a.pt", "--gpt-ckpt": "b.pt"})
    assert "give one of them" in refusal(both, tmp_path)
    fp16 = command(codes, tmp_path, "--parallel", "fsdp", x={"--mixed-precision": "fp16"})
    assert "--mixed-precision bf16" in refusal(fp16, tmp_path)


def test_a_refusal_of_two_processes_is_said_once(codes, tmp_path, monkeypatch):
    monkeypatch.setenv("NPP_USER_ERROR_FILE", str(tmp_path / "marker"))
    refusal(command(codes, tmp_path, x={"--vocab-size": 8}), tmp_path, world_size=2)
    assert (tmp_path / "log").read_text().count("error: ") == 1


def test_a_run_folder_keeps_to_its_recipe(codes, tmp_path):
    assert train(command(codes, tmp_path)) == [0]
    other = command(codes, tmp_path, x={"--lr": 0.5})
    assert train(other, output=tmp_path / "log") == [2]
    sentence = (tmp_path / "log").read_text().splitlines()[-1]
    assert "trained with other settings: lr (0.001 there, 0.5 here)" in sentence
    assert "another --run-name" in sentence


def test_without_a_run_name_the_recipe_names_the_folder(codes, tmp_path):
    def unnamed(**changes):
        arguments = command(codes, tmp_path, **changes)
        at = arguments.index("--run-name")
        return arguments[:at] + arguments[at + 2 :]

    assert train(unnamed()) == train(unnamed()) == train(unnamed(x={"--log-every": 3})) == [0]
    assert len(list(tmp_path.iterdir())) == 1
    assert train(unnamed(x={"--lr": 0.5})) == [0]
    assert len(list(tmp_path.glob("GPT-Tiny-????????"))) == 2


def test_two_jobs_never_share_a_folder(codes, tmp_path):
    first = fork(lambda: _train_slowly(command(codes, tmp_path)), tmp_path / "first")
    try:
        while not list(tmp_path.glob("run/checkpoints/*.pt")):
            assert os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None  # it lives
            time.sleep(0.02)
        assert train(command(codes, tmp_path), output=tmp_path / "second") == [2]
        assert "another process is training in" in (tmp_path / "second").read_text()
    finally:
        wait(first, kill_after=0)


def _train_slowly(arguments):
    import sys

    from tests.tiny_training import shrink_gpt
    from utils.engine.run import TrainingRun

    shrink_gpt()
    end_step = TrainingRun.end_step
    TrainingRun.end_step = lambda self, done, *rest: (end_step(self, done, *rest), time.sleep(60 if done > 3 else 0))
    sys.argv = ["program", *arguments]
    train_c2i.main()


def test_what_a_run_leaves_behind(codes, tmp_path):
    mirror = tmp_path / "cloud"
    assert train(command(codes, tmp_path, "--ema", x={"--cloud-save-path": mirror}), output=tmp_path / "log") == [0]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["args"]["epochs"] == 4
    assert config["config"]["model"]["grid"] == [4, 4]
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.keys() >= {"model", "optimizer", "ema", "steps", "args", "config"}
    assert checkpoint["config"]["tokenizer"]["name"] == "VQ-Tiny"
    assert checkpoint["config"]["class_names"][2] == "class_2"
    Transformer(ModelArgs(**TINY)).load_state_dict(checkpoint["model"], strict=True)
    kept = [path.name for path in sorted((tmp_path / "run/checkpoints").glob("0*.pt"))]
    assert kept == [
        "0000006.pt",
        "0000009.pt",
        "0000012.pt",
    ]  # the newest three; the level's end would stay in any case
    assert [path.name for path in sorted((mirror / "run/checkpoints").glob("0*.pt"))] == kept
    log = (tmp_path / "log").read_text()
    assert "0.62x the cost of next-token prediction" in log
    assert "scripts/autoregressive/sample_c2i.sh --gpt-ckpt" in log
    named = [{key for key in row if key.startswith("loss")} for row in rows(tmp_path)]
    assert named == [{"loss_2x2"}] * 3 + [{"loss_1x1"}] * 3
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {"step", "level", "side", "lr", "epoch", "grad_norm", "images_per_second", "data_wait"}


def test_a_finished_run_does_nothing_more(codes, tmp_path):
    assert train(command(codes, tmp_path)) == [0]
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert train(command(codes, tmp_path)) == [0]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_no_local_save_keeps_everything_at_the_second_place(codes, tmp_path):
    cloud = tmp_path / "cloud"
    arguments = command(codes, tmp_path / "results", "--no-local-save", x={"--cloud-save-path": cloud})
    assert train(arguments) == [0]
    assert (cloud / "run/checkpoints/0000012.pt").exists()
    assert not (tmp_path / "results").exists()


@pytest.fixture
def codes_of_a_tokenizer(tmp_path):
    """The file of a tokenizer, and a folder of codes and one of held-out codes that are said to be its own."""
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=8)
    torch.save({"model": tokenizer.state_dict()}, tmp_path / "vq.pt")
    for name, count, seed in (("codes", 24, 0), ("held-out", 10, 1)):
        make_store(tmp_path / name / "tiny16_codes", count=count, seed=seed, tokenizer_hash=sha256(tmp_path / "vq.pt"))
    return tmp_path / "codes"


def test_a_grid_is_drawn_by_the_tokenizer_of_the_codes_or_not_at_all(codes, codes_of_a_tokenizer, tmp_path):
    arguments = command(codes, tmp_path, x={"--vq-ckpt": tmp_path / "vq.pt"})
    assert train(arguments, output=tmp_path / "log") == [2]
    assert "this GPT was trained on codes of another tokenizer" in (tmp_path / "log").read_text()


def test_what_a_kill_prevented_is_made_up_for(codes_of_a_tokenizer, tmp_path):
    """Killed after the checkpoint of a step, before the validation and the grid that follow it."""
    watching = {"--val-code-path": tmp_path / "held-out", "--val-every": 3, "--vq-ckpt": tmp_path / "vq.pt"}
    watching |= {"--sample-every": 3}
    whole, parts = (command(codes_of_a_tokenizer, tmp_path / name, x=watching) for name in ("whole", "parts"))
    assert train(whole) == [0]

    def kill_before_validation():
        original = Monitor.after_step

        def after_step(self, steps_done):
            if steps_done == 6:
                self.training._writer.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, steps_done)

        Monitor.after_step = after_step

    assert train(parts, before=kill_before_validation) == [-signal.SIGKILL]
    assert train(parts) == [0]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    grids = [sorted((tmp_path / name / "run/samples").glob("*.png")) for name in ("whole", "parts")]
    assert [grid.read_bytes() for grid in grids[0]] == [grid.read_bytes() for grid in grids[1]]
    assert len(grids[0]) == 4


def test_validation_and_sample_grids_change_nothing(codes_of_a_tokenizer, tmp_path):
    codes = codes_of_a_tokenizer
    assert train(command(codes, tmp_path / "plain", "--ema")) == [0]
    watching = {
        "--val-code-path": tmp_path / "held-out",
        "--val-every": 4,
        "--vq-ckpt": tmp_path / "vq.pt",
        "--sample-every": 5,
    }
    assert train(command(codes, tmp_path / "watched", "--ema", x=watching)) == [0]
    assert_same_state(last_checkpoint(tmp_path / "watched")["model"], last_checkpoint(tmp_path / "plain")["model"])
    validation = [row for row in rows(tmp_path / "watched") if any(key.startswith("val_loss") for key in row)]
    assert [(row["step"], *list(row)[1:]) for row in validation] == [
        (4, "val_loss_2x2", "val_loss_1x1"),
        (8, "val_loss_1x1"),
        (12, "val_loss_1x1"),
    ]
    grids = sorted((tmp_path / "watched/run/samples").glob("*.png"))
    assert [grid.name for grid in grids] == ["0000005.png", "0000010.png", "0000012.png"]
    assert Image.open(grids[0]).size == (8 * 18 + 2, 8 * 18 + 2)
    # The validation loss is the mean over all held-out images, on any number of processes.
    two = command(codes, tmp_path / "two", "--parallel", "fsdp", x=watching | NO_DROPOUT | {"--sample-cfg-scale": 1})
    one = command(codes, tmp_path / "one", x=watching | NO_DROPOUT | {"--sample-cfg-scale": 1})
    assert train(two, 2) == [0, 0]
    assert train(one) == [0]
    for mine, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_held_out_codes_of_another_kind_are_refused(codes, tmp_path):
    make_store(tmp_path / "held-out/tiny16_codes", count=10, num_classes=5)
    assert train(command(codes, tmp_path, x={"--val-code-path": tmp_path / "held-out"}), output=tmp_path / "log") == [2]
    assert (
        "extracted with other settings: number of classes (5 there, 4 here); extract held-out"
        in (tmp_path / "log").read_text()
    )


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(codes, tmp_path):
    def full_from_step_9():
        from utils.engine.checkpoint_files import CheckpointWriter

        write = CheckpointWriter._write
        CheckpointWriter._write = lambda self, step, state: write(self, step, state) if step < 9 else None

    assert train(command(codes, tmp_path), output=tmp_path / "log", before=full_from_step_9) == [2]
    assert "0000012.pt could not be written; free some space" in (tmp_path / "log").read_text()
    assert train(command(codes, tmp_path)) == [0]


def test_start_from_published_weights(codes, tmp_path):
    """A file as LlamaGen publishes them carries its settings as a Namespace."""
    model = Transformer(ModelArgs(**TINY))
    torch.nn.init.normal_(model.output.weight)
    published = {"model": model.state_dict(), "args": argparse.Namespace(gpt_model="GPT-B"), "steps": 7}
    torch.save(published, tmp_path / "c2i.pt")
    frozen = {"--init-from": tmp_path / "c2i.pt", "--lr": 0, "--end-lr": 0}
    assert train(command(codes, tmp_path, x=frozen), output=tmp_path / "log") == [0]
    assert "starting from the raw weights" in (tmp_path / "log").read_text()
    assert_same_state(last_checkpoint(tmp_path)["model"], dict(model.state_dict()))
    wrong = command(codes, tmp_path, x={"--gpt-ckpt": tmp_path / "c2i.pt", "--run-name": "other"})
    assert train(wrong, output=tmp_path / "log2") == [2]
    assert "holds no optimizer" in (tmp_path / "log2").read_text()
    assert "use --init-from" in (tmp_path / "log2").read_text()


def test_continue_in_another_folder_with_gpt_ckpt(codes, tmp_path):
    assert train(command(codes, tmp_path)) == [0]
    middle = tmp_path / "run/checkpoints/0000006.pt"
    assert train(command(codes, tmp_path, x={"--gpt-ckpt": middle, "--run-name": "again"})) == [0]
    assert_same_state(last_checkpoint(tmp_path, "again")["model"], last_checkpoint(tmp_path)["model"])
    finished = command(codes, tmp_path, x={"--gpt-ckpt": tmp_path / "run/checkpoints/last.pt", "--run-name": "more"})
    assert train(finished, output=tmp_path / "log3") == [2]
    assert "has 12 steps, this run ends at 12; raise --epochs" in (tmp_path / "log3").read_text()
    bigger = command(codes, tmp_path, x={"--gpt-ckpt": middle, "--run-name": "other", "--dropout-p": 0.3})
    assert train(bigger, output=tmp_path / "log") == [2]
    assert (
        "was trained with other settings: model.resid_dropout_p (0.1 there, 0.3 here)" in (tmp_path / "log").read_text()
    )


def test_a_checkpoint_with_code_in_it_is_not_run(codes, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (exec, ("raise SystemExit(77)",))

    torch.save({"model": {}, "x": Malicious()}, tmp_path / "bad.pt")
    assert train(command(codes, tmp_path, x={"--init-from": tmp_path / "bad.pt"}), output=tmp_path / "log") == [2]
    assert "not read, for safety" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train(precision, codes, tmp_path):
    assert train(command(codes, tmp_path, x={"--mixed-precision": precision})) == [0]
    assert rows(tmp_path)[-1]["loss_1x1"] == pytest.approx(4.16, abs=0.1)


def test_gradients_that_are_not_finite_are_skipped_counted_and_in_the_end_fatal(codes, tmp_path):
    def poison(step_range):
        original = train_c2i.set_learning_rate
        forward = Transformer.head_loss

        def start_step(optimizer, lr):
            Transformer.poisoned = next(steps) in step_range
            return original(optimizer, lr)

        steps = itertools.count()
        train_c2i.set_learning_rate = start_step
        Transformer.head_loss = lambda self, *a: forward(self, *a) * (float("nan") if self.poisoned else 1.0)

    assert train(command(codes, tmp_path), before=lambda: poison(range(3, 5))) == [0]
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 2, 2, 2, 2]
    assert all(value.isfinite().all() for value in last_checkpoint(tmp_path)["model"].values())
    fatal = command(codes, tmp_path, x={"--run-name": "fatal", "--max-skipped-steps": 4})
    assert train(fatal, output=tmp_path / "log", before=lambda: poison(range(99))) == [2]
    assert "the gradients of 4 steps in a row were not finite" in (tmp_path / "log").read_text()
    assert "lower --lr" in (tmp_path / "log").read_text()


def test_tensorboard_when_asked_for(codes, tmp_path):
    assert train(command(codes, tmp_path, "--tensorboard")) == [0]
    events = next((tmp_path / "run/tensorboard").glob("events.out.tfevents.*")).read_bytes()
    assert b"loss_2x2" in events
    assert b"loss_1x1" in events


def test_dry_run_of_the_published_recipes(tmp_path):
    for model in ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL"):
        arguments = (
            f"--dry-run --gpt-model {model} --image-size 256 --epoch-rate 0.5 --patch-level 2 --scheduler".split()
        )
        log = tmp_path / model
        assert run_main(train_c2i.main, arguments, output=log) == [0]
        assert "0.62x the cost of next-token prediction" in log.read_text()
        assert "750,600" in log.read_text()


def test_a_trained_model_generates(codes, tmp_path):
    assert train(command(codes, tmp_path)) == [0]
    model = Transformer(ModelArgs(**TINY)).eval()
    model.load_state_dict(read_checkpoint(tmp_path / "run/checkpoints/0000012.pt")["model"])
    assert generate(model, torch.tensor([0, 3]), 16, cfg_scale=2.0).shape == (2, 16)
