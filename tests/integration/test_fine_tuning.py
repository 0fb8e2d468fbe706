"""Starting from weights of other classes or another grid (docs/fine-tuning.md)."""

import argparse
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from autoregressive.models import gpt
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train.config import GPTChoice
from autoregressive.train.initial import load_initial
from dataset.code_dataset import CodeDataset, CodeLoader
from dataset.code_store import find_stores
from tests.stores import make_store
from tests.tiny_training import NO_DROPOUT, command, last_checkpoint, rows, tiny_store, train

TINY = dict(n_layer=2, n_head=2, dim=32, vocab_size=64, block_size=16)
TABLE = "cls_embedding.embedding_table.weight"
KEEPING_NULL = {name: 0 for name in NO_DROPOUT if name != "--class-dropout-p"}


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights of seven classes and their null class that predict something, as LlamaGen's files carry them."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**TINY, num_classes=7))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("published") / "c2i.pt"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(num_classes=7)}, path)
    return path, model


def first_batch(codes):
    dataset = CodeDataset(find_stores(codes, "tiny", 16), seed=0)
    return next(iter(CodeLoader(dataset, 8, 0, 1, 0, 0, torch.device("cpu"))))


def test_new_classes_begin_as_the_null_class(codes, published, tmp_path):
    path, model = published
    flags = KEEPING_NULL | {"--init-from": path, "--log-every": 1}
    assert train(command(codes, tmp_path, x=flags), output=tmp_path / "log") == [0]
    assert "4 classes in place of its 7; each starts from its null class" in (tmp_path / "log").read_text()
    images, _ = first_batch(codes)
    _, under_null = model.eval()(images, torch.full((8,), 7), images, 2)
    first = rows(tmp_path)[0]["loss_2x2"]
    assert first == pytest.approx(under_null.item(), abs=1e-4)
    assert abs(first - 4.16) > 0.1  # where a model with new weights begins


def test_new_classes_begin_as_chosen_ones(codes, published, tmp_path):
    path, model = published
    frozen = {"--init-from": path, "--lr": 0, "--end-lr": 0, "--init-classes": "5, null,2,5"}
    assert train(command(codes, tmp_path, x=frozen), output=tmp_path / "log") == [0]
    assert "0 from 5 5, 1 from null, 2 from 2 2, 3 from 5 5" in (tmp_path / "log").read_text()
    table = model.state_dict()[TABLE]
    assert torch.equal(last_checkpoint(tmp_path)["model"][TABLE], table[[5, 7, 2, 5, 7]])


def test_as_many_classes_are_kept_unless_told_otherwise(published, tmp_path):
    path, model = published
    make_store(tmp_path / "codes/tiny16_codes", count=24, num_classes=7)
    flags = {"--init-from": path, "--lr": 0, "--end-lr": 0, "--num-classes": 7}
    for name, choice, expected in (("kept", {}, [*range(8)]), ("null", {"--init-classes": "null"}, [7] * 8)):
        assert train(command(tmp_path / "codes", tmp_path, x=flags | choice | {"--run-name": name})) == [0]
        assert torch.equal(last_checkpoint(tmp_path, name)["model"][TABLE], model.state_dict()[TABLE][expected])


def test_another_grid(published, tmp_path):
    path, _ = published
    make_store(tmp_path / "codes/tiny32_codes", count=24, grid=(8, 8), image_size=32)
    torch.save(torch.load(path, weights_only=False) | {"config": {"model": {"grid": [4, 4]}}}, tmp_path / "c2i.pt")
    flags = {"--init-from": tmp_path / "c2i.pt", "--image-size": 32}
    assert train(command(tmp_path / "codes", tmp_path, x=flags), output=tmp_path / "log") == [0]
    assert "the grid of 8x8 codes is new to them: they were trained on 4x4" in (tmp_path / "log").read_text()
    assert last_checkpoint(tmp_path)["config"]["model"]["grid"] == (8, 8)


def test_the_body_learns_more_slowly_or_not_at_all(codes, published, tmp_path):
    path, model = published
    before, moved = model.state_dict(), {}
    for share in (0, 0.1, 1):
        flags = NO_DROPOUT | {"--class-dropout-p": 0.1, "--init-from": path, "--body-lr-share": share}
        flags |= {"--run-name": f"run-{share}", "--weight-decay": 0}
        assert train(command(codes, tmp_path, "--ema", x=flags)) == [0]
        after = last_checkpoint(tmp_path, f"run-{share}")["model"]
        assert not torch.equal(after[TABLE][:4], before[TABLE][[7] * 4])
        moved[share] = (after["layers.0.feed_forward.w1.weight"] - before["layers.0.feed_forward.w1.weight"]).norm()
    assert moved[0] == 0
    assert 0.05 * moved[1] < moved[0.1] < 0.2 * moved[1]
    arguments = command(codes, tmp_path, "--ema", x=flags | {"--run-name": "run-0", "--body-lr-share": 0})
    assert train(arguments) == [0]  # and a run with frozen weights continues


def test_frozen_on_two_processes(codes, published, tmp_path):
    flags = {"--init-from": published[0], "--body-lr-share": 0}
    assert train(command(codes, tmp_path, x=flags), 2) == [0, 0]
    assert train(command(codes, tmp_path, "--parallel", "fsdp", x=flags | {"--run-name": "fsdp"}), 2) == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--init-classes": "1,2"}, "--init-classes names 2 classes for 4; give one for all, or one for each"),
        ({"--init-classes": "9"}, "there is no class 9; --init-classes takes labels 0 to 6"),
        ({"--init-from": "narrow.pt"}, "it holds a model of 2 layers and width 16; give that as --gpt-model"),
        ({"--init-from": "codebook.pt"}, "was trained on a codebook of 32 codes, not 64; extract the images"),
        ({"--init-from": "no-null.pt"}, "was trained without a null class; give --class-dropout-p 0"),
        (
            {"--init-from": "no-null.pt", "--class-dropout-p": 0},
            "has no null class for new ones to start from; name some of its own by --init-classes",
        ),
    ],
)
def test_refusals(changes, message, codes, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, other in (
        ("narrow", {"dim": 16}),
        ("codebook", {"vocab_size": 32}),
        ("no-null", {"class_dropout_prob": 0.0}),
    ):
        state = Transformer(ModelArgs(**TINY | {"num_classes": 7} | other)).state_dict()
        torch.save({"model": state, "args": argparse.Namespace(num_classes=7)}, f"{name}.pt")
    arguments = command(codes, tmp_path, x={"--init-from": published[0]} | changes)
    assert train(arguments, output=tmp_path / "log") == [2]
    assert message in (tmp_path / "log").read_text()


def test_settings_that_no_shape_shows_are_told(tmp_path):
    args = ModelArgs(**TINY, rope_base=500.0)
    config = {"model": dataclasses.asdict(args)}
    torch.save({"model": Transformer(args).state_dict(), "config": config}, tmp_path / "c2i.pt")
    codes, chosen = SimpleNamespace(tokenizer={}), GPTChoice(init_from=str(tmp_path / "c2i.pt"))
    told = load_initial(Transformer(ModelArgs(**TINY, n_kv_head=2)), chosen, codes)
    assert told[2:] == [
        "warning: they were trained with rope_base 500.0, not 10000.0; their layers compute something else now"
    ]
    assert load_initial(Transformer(args), chosen, codes)[2:] == []


def test_chosen_rows_need_weights_to_choose_from(codes, tmp_path):
    assert train(command(codes, tmp_path, x={"--init-classes": "null"}), output=tmp_path / "log") == [2]
    assert "--init-classes names classes of the weights that --init-from gives" in (tmp_path / "log").read_text()


def test_names_of_imagenet_name_rows():
    from autoregressive.sample.class_names import class_names, parse_classes

    assert parse_classes("golden retriever", class_names(1000, None), "--init-classes") == [207]
    assert "GPT-B" in gpt.GPT_SIZES
