"""Weights in the form of the Hugging Face hub: converted without loss, read by every flag, fetched and pushed."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.sampling_models import write_models

pytest.importorskip("safetensors")  # which requirements.txt names
from safetensors.torch import load_file, save_file

from autoregressive import export
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.gpt_hf import TransformerHF
from autoregressive.models.load import GPTSettings, build_gpt
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.sample_c2i import main as sample_one
from autoregressive.train.config import GPTChoice
from autoregressive.train.initial import load_initial
from pretrained_models import hub as hub_module
from pretrained_models.catalogue import find_weights
from tests.small_hub import TOKEN, point_to, small_hub
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_model_hf import VQModelHF
from utils.checkpoint import read_checkpoint
from utils.program import UserError

GUIDE = Path(__file__).parents[2] / "docs/hub.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GPT as our trainer writes it, with averages, its tokenizer, and both in the hub's form."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    checkpoint = read_checkpoint(folder / "c2i_B_256.pt")
    averages = {name: value + 0.125 for name, value in checkpoint["model"].items()}
    args = {
        "lr": 3e-4,
        "epochs": 7,
        "results_dir": "/home/me/results",
        "code_path": "/home/me",
        "loss": "/home/me/l.py:l",
    }
    places = {"tokenizer": str(folder / "vq.pt")}
    torch.save(checkpoint | {"ema": averages, "args": args, "places": places}, folder / "run.pt")
    run("export", folder / "run.pt", folder / "hub")
    return folder


def run(name, *arguments):
    """The program in this process."""
    command, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        {"export": export.main, "sample_one": sample_one}[name]()
    finally:
        sys.argv = command


def test_every_tensor_comes_back_both_ways(models, tmp_path, capsys):
    run("export", models / "hub", tmp_path / "back.pt")
    assert "the ema weights of" in capsys.readouterr().out
    run("export", models / "hub/tokenizer", tmp_path / "vq.pt")
    run("export", models / "run.pt", tmp_path / "raw", "--weights", "raw", "--tokenizer", tmp_path / "vq.pt")
    original = torch.load(models / "run.pt", weights_only=True)
    for state, expected in (
        (load_file(models / "hub/model.safetensors"), original["ema"]),  # with the library alone
        (torch.load(tmp_path / "back.pt", weights_only=True)["model"], original["ema"]),
        (load_file(tmp_path / "raw/model.safetensors"), original["model"]),
        (load_file(tmp_path / "raw/tokenizer/model.safetensors"), torch.load(models / "vq.pt")["model"]),
    ):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert all(state[name].dtype == expected[name].dtype for name in expected)


def test_converted_weights_are_known_as_what_they_were(models, tmp_path):
    run("export", models / "hub", tmp_path / "back.pt")
    names = [models / "run.pt", models / "hub", tmp_path / "back.pt"]
    infos = [build_gpt(GPTSettings(str(name)))[1] for name in names]
    assert len({info.sha256 for info in infos}) == 1
    assert {(info.weights, info.steps, info.image_size, info.class_names[1]) for info in infos} == {
        ("ema", 7, 16, "digit 1")
    }
    config = json.loads((models / "hub/config.json").read_text())
    config["model"]["rope_base"] = 500.0
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited/config.json").write_text(json.dumps(config))
    (tmp_path / "edited/model.safetensors").symlink_to(models / "hub/model.safetensors")
    edited = build_gpt(GPTSettings(str(tmp_path / "edited")))[1]
    assert edited.sha256 != infos[0].sha256


def test_every_flag_takes_a_folder(models, tmp_path, capsys):
    pictures = []
    for number, names in enumerate(
        (
            (models / "run.pt", models / "vq.pt", "--vq-model", "VQ-Tiny", "--codebook-size", 64),
            (models / "hub", models / "hub/tokenizer"),
        )
    ):
        out = tmp_path / f"{number}.png"
        sizes = ("--codebook-embed-dim", 4, "--classes", "3", "--cfg-scale", "2", "--output", out)
        run("sample_one", "--gpt-ckpt", names[0], "--vq-ckpt", *names[1:], *sizes)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    pipeline = Pipeline.from_pretrained(models / "hub")
    assert pipeline.tokenizer_info.checkpoint == str(models / "hub/tokenizer")
    model, codes = Transformer(pipeline.gpt.args), SimpleNamespace(tokenizer={})
    assert "its 10 classes are kept" in load_initial(model, GPTChoice(init_from=str(models / "hub")), codes)


def test_the_card_and_the_configuration_say_what_it_is(models, tmp_path):
    report = {"metrics": {"fid": 4.47}, "sample": {"name": "x.npz", "count": 50000, "path": "/home/me/x.npz"}}
    (tmp_path / "x.json").write_text(json.dumps(report))
    run("export", models / "run.pt", tmp_path / "hub", "--report", tmp_path / "x.json", "--license", "apache-2.0")
    card = (tmp_path / "hub/README.md").read_text()
    for said in ('license: "apache-2.0"', "averaged (EMA)", "7 steps", "| lr | 0.0003 |", "| fid | 4.47 |", "50000"):
        assert said in card, said
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["model"]["grid"] == [4, 4]
    assert config["tokenizer"]["name"] == "VQ-Tiny"
    assert config["export"]["code"]
    assert "/home/me" not in card + json.dumps(config)
    for source, target in (("hub", "a.pt"), ("a.pt", "b")):
        run("export", tmp_path / source, tmp_path / target)
    TransformerHF.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    for place in ("b", "c"):
        kept = json.loads((tmp_path / place / "config.json").read_text())["export"]
        assert kept == config["export"], place
    run("export", models / "run.pt", tmp_path / "own")
    assert "Licence: not stated." in (tmp_path / "own/README.md").read_text()
    model = TransformerHF.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        model.output.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned/config.json").read_text())["export"]["metrics"] is None
    assert config["export"]["training"]["loss"] == "l.py:l"
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(UserError, match="is no report of the evaluator"):
        run("export", models / "run.pt", tmp_path / "other", "--report", tmp_path / "y.json")


def test_published_layouts_and_the_next_command(models, tmp_path, capsys):
    sizes = ("--image-size", 16, "--downsample-size", 4)
    with pytest.raises(UserError, match="does not say on which images it was trained; give --image-size"):
        run("export", models / "bare.pt", tmp_path / "hub")
    run("export", models / "bare.pt", tmp_path / "hub", *sizes)
    said = capsys.readouterr().out
    assert "its tokenizer is not known here" in said
    assert f"sample_one_c2i.sh --gpt-ckpt {tmp_path}/hub --vq-ckpt TOKENIZER.pt" in said
    model, info = build_gpt(GPTSettings(str(tmp_path / "hub")))
    assert (model.args.grid, info.name, info.image_size) == ((4, 4), "GPT-Tiny", 16)
    run("export", models / "vq.pt", tmp_path / "vq", "--vq-model", "VQ-Tiny")
    assert f"reconstruction_vq.sh --vq-ckpt {tmp_path}/vq" in capsys.readouterr().out
    assert build_tokenizer(TokenizerSettings(str(tmp_path / "vq")))[1].codebook_size == 64


def test_a_part_of_ones_own_is_kept_and_never_run(models, tmp_path):
    checkpoint = read_checkpoint(models / "run.pt")
    conditioning = "/home/me/captions.py:Captions sha256 0123"
    plain = checkpoint | {"config": checkpoint["config"] | {"conditioning": "captions.py:Captions"}}
    torch.save(plain, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="give --conditioning 'captions.py:Captions'"):
        build_gpt(GPTSettings(str(tmp_path / "plain.pt")))
    torch.save(checkpoint | {"config": checkpoint["config"] | {"conditioning": conditioning}}, tmp_path / "own.pt")
    run("export", tmp_path / "own.pt", tmp_path / "hub", "--vq-model", "VQ-Tiny")
    with pytest.raises(UserError, match="was trained with another conditioning; give --conditioning 'captions.py:Cap"):
        build_gpt(GPTSettings(str(tmp_path / "hub")))
    fsq = {"args": {"vq_model": "/home/me/fsq.py:FSQ"}, "config": {"vq_model_identity": "/home/me/fsq.py:FSQ sha256 1"}}
    torch.save({"model": {"levels": torch.ones(3)}} | fsq, tmp_path / "fsq.pt")
    run("export", tmp_path / "fsq.pt", tmp_path / "fsq")
    with pytest.raises(UserError, match="was trained with --vq-model 'fsq.py:FSQ'; give it"):
        build_tokenizer(TokenizerSettings(str(tmp_path / "fsq")))


def test_refusals(models, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/x.txt").write_text("")
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "foreign.pt")
    for arguments, message in (
        ((models / "run.pt", tmp_path / "notes"), "notes holds other files; name a new folder"),
        ((models / "run.pt", tmp_path / "notes/x.txt"), "x.txt is a file; name a folder"),
        ((models / "hub", models / "run.pt"), "run.pt exists; name another file"),
        ((models / "hub", models / "hub"), "holds what is to be converted"),
        ((models / "vq.pt", tmp_path / "a", "--vq-model", "VQ-Tiny", "--tokenizer", "x"), "is a tokenizer itself"),
        ((models / "run.pt", tmp_path / "a", "--tokenizer", models / "bare.pt"), "bare.pt does not say|is a GPT"),
        ((models / "run.pt", tmp_path / "a.pt", "--push", "me/a"), "name a folder instead of a .pt"),
        ((models / "run.pt", tmp_path / "a", "--push", "me"), "--push 'me' cannot be a repository of the hub"),
        (("", tmp_path / "a"), "weights are named by an empty text"),
        ((models / "run.pt", tmp_path / "a", "--private"), "--private is for the repository of --push"),
        ((tmp_path / "foreign.pt", tmp_path / "a"), "holds neither a GPT nor a tokenizer"),
        ((models / "bare.pt", tmp_path / "a", "--weights", "ema"), "holds no EMA weights; use --weights raw"),
        ((models / "hub", tmp_path / "a.pt", "--weights", "raw"), "holds EMA weights alone; use --weights ema"),
    ):
        with pytest.raises(UserError, match=message):
            run("export", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.pt", "notes"]


def test_another_tokenizer_does_not_go_with_the_gpt(models, tmp_path):
    other = read_checkpoint(models / "vq.pt")
    other["model"]["post_quant_conv.bias"] += 1
    torch.save(other, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="was trained on codes of another tokenizer"):
        run("export", models / "run.pt", tmp_path / "hub", "--tokenizer", tmp_path / "vq.pt")


def test_damage_in_the_hub_form(models, tmp_path):
    content = (models / "hub/model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((models / "hub/config.json").read_text())
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged, message in (
        (bytes(flipped), "model.safetensors is damaged: .* differs from its checksum"),
        (content[:-50], "is cut short or damaged"),
        (content[:20], "is cut short or damaged"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of git-lfs"),
        (b"<!DOCTYPE html>", "is a web page"),
    ):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    for config in ("{", "[]", '{"export": 1}', '{"a":' * 10**5):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match="config.json is damaged or no model's"):
            read_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds no weights: it has no config.json; name a checkpoint, a run folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (None, {"model": "abc", "class_names": 5, "tokenizer": "x", "image_size": "x", "conditioning": 5}),
        (None, {"tokenizer": {"hash": 5}, "class_names": [1, 2], "gpt_model": [], "downsample_size": 0.5}),
        ("model", {"n_layer": "2", "dim": 0, "n_head": 3, "grid": "x", "norm_eps": float("nan"), "rope_base": "x"}),
        ("model", {"grid": [4], "cls_token_num": True}),
        ("export", {"weights": "zz", "steps": "many", "training": [], "metrics": 5, "license": 5}),
    ],
)
def test_values_that_no_configuration_has(models, tmp_path, part, values):
    (tmp_path / "model.safetensors").symlink_to(models / "hub/model.safetensors")
    for name, value in values.items():
        config = json.loads((models / "hub/config.json").read_text())
        (config if part is None else config[part])[name] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        for use in (
            lambda: build_gpt(GPTSettings(str(tmp_path))),
            lambda: run("export", tmp_path, tmp_path / "out", "--vq-model", "VQ-Tiny"),
        ):
            with pytest.raises(UserError, match="is damaged or no model's|holds a model of"):
                use()


def test_values_that_no_tokenizer_has(models, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(models / "hub/tokenizer/model.safetensors")
    for name, value in (("vq_model", 5), ("codebook_size", "x"), ("encoder_ch_mult", ["x"]), ("channels", 1.5)):
        config = json.loads((models / "hub/tokenizer/config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        for use in (lambda: build_tokenizer(TokenizerSettings(str(tmp_path))), lambda: run("export", tmp_path, "out")):
            with pytest.raises(UserError, match=f"is damaged or no model's .{name} must be"):
                use()


def test_no_tokenizer_of_other_weights_stays(models, tmp_path):
    sizes = ("--image-size", 16, "--downsample-size", 4)
    for source, arguments in (("bare.pt", sizes), ("vq.pt", ("--vq-model", "VQ-Tiny"))):
        run("export", models / "run.pt", tmp_path / "out")
        assert (tmp_path / "out/tokenizer/config.json").exists()
        run("export", models / source, tmp_path / "out", *arguments)
        assert not (tmp_path / "out/tokenizer").exists()
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (tmp_path / "out/config.json").stat().st_mode


def test_safetensors_of_others_are_read_alone(models, tmp_path):
    state = read_checkpoint(models / "bare.pt")
    save_file(state, tmp_path / "c2i.safetensors")
    loaded, info = build_gpt(GPTSettings(str(tmp_path / "c2i.safetensors"), image_size=16, downsample_size=4))
    assert torch.equal(loaded.output.weight, state["output.weight"])
    assert info.name == "GPT-Tiny"
    save_file(state, tmp_path / "c2i.pt")
    with pytest.raises(UserError, match="is a safetensors file, not a PyTorch checkpoint; give it a name that ends in"):
        read_checkpoint(tmp_path / "c2i.pt")


def test_a_run_folder_stands_for_its_newest_checkpoint(models, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_weights(str(tmp_path / "run"))
    (tmp_path / "run/checkpoints/last.pt").symlink_to(models / "run.pt")
    assert find_weights(str(tmp_path / "run")) == models / "run.pt"


# --- the hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub_module.fetch_repository.cache_clear()
    with small_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub
    hub_module.fetch_repository.cache_clear()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_and_fetched_again(hub, models, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="the hub refuses access to me/digits; log in"):
        run("export", models / "run.pt", tmp_path / "hub", "--push", "me/digits")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run("export", models / "run.pt", tmp_path / "hub", "--push", "me/digits", "--private")
    assert "--gpt-ckpt me/digits --vq-ckpt me/digits/tokenizer" in capsys.readouterr().out
    assert "# me/digits\n" in (tmp_path / "hub/README.md").read_text()
    assert hub.private == {"me/digits"}
    run("export", tmp_path / "hub", tmp_path / "hub", "--push", "me/again")  # as it is
    with pytest.raises(UserError, match="is uploaded as it is, without --license"):
        run("export", tmp_path / "hub", tmp_path / "hub", "--push", "me/again", "--license", "mit")
    assert hub.repositories["me/again"] == hub.repositories["me/digits"]
    fetched, info = build_gpt(GPTSettings("me/digits"))
    assert torch.equal(fetched.output.weight, build_gpt(GPTSettings(str(models / "hub")))[0].output.weight)
    assert find_weights("me/digits/tokenizer").samefile(info.places["tokenizer"])
    asked = len(hub.asked)
    assert find_weights("me/digits").samefile(info.checkpoint)
    assert len(hub.asked) == asked  # one answer for the whole process
    hub_module.fetch_repository.cache_clear()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.repositories.clear()  # what is in the cache serves
    assert find_weights("me/digits").samefile(info.checkpoint)


def test_the_lines_of_the_guide(hub, models, tmp_path, monkeypatch):
    """As they stand there, with tiny weights under their names."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    for revision in ("main", "v1"):
        hub.publish("ORG/NAME", files_of(models / "hub"), revision=revision)
    (tmp_path / "results/mine/checkpoints").mkdir(parents=True)
    (tmp_path / "results/mine/checkpoints/last.pt").symlink_to(models / "run.pt")
    pushed = []
    monkeypatch.setattr(export, "push", lambda *arguments: pushed.append(arguments))
    parts = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(parts) == 3
    for lines in parts:
        exec(lines, {})
    assert pushed == [(Path("OUT"), "ORG/NAME", True)]
    assert {"OUT/tokenizer/config.json", "OUT_VQ/config.json"} <= files_of(tmp_path).keys()
    for call, name in ((TransformerHF.from_pretrained, "ORG/NAME"), (VQModelHF.from_pretrained, "ORG/NAME/tokenizer")):
        with pytest.raises(UserError, match="there is no argument token; there are"):
            call(name, token="x")


def test_revisions_and_repositories_without_a_tokenizer(hub, models):
    files = files_of(models / "hub")
    hub.publish("me/gpt", {name: content for name, content in files.items() if "tokenizer" not in name})
    hub.publish("me/gpt", {"config.json": b"{}"}, revision="old")
    assert build_gpt(GPTSettings("me/gpt"))[1].places == {}
    with pytest.raises(UserError, match="the repository me/gpt has no model.safetensors, so it is not in the form"):
        find_weights("me/gpt@old")
    with pytest.raises(UserError, match="me/gpt has no revision new"):
        find_weights("me/gpt@new")
    with pytest.raises(UserError, match="the repository me/gpt has no tokenizer/config.json"):
        find_weights("me/gpt/tokenizer")


def test_what_may_go_wrong_is_one_sentence(hub, models, monkeypatch):
    hub.publish("me/hidden", files_of(models / "hub"))
    hub.private.add("me/hidden")
    for name in ("me/hidden", "me/nothing"):
        with pytest.raises(
            UserError, match="there is no file or folder me/.* here, and the hub has no repository of th"
        ):
            find_weights(name)
    hub.private.clear()
    hub.announces = 7
    with pytest.raises(UserError, match="another number of bytes arrived than the hub announced; run the same command"):
        find_weights("me/hidden")
    point_to(monkeypatch, 9)  # nobody listens there
    with pytest.raises(
        UserError, match="and the hub cannot be reached to look for a repository of that name .*HF_ENDP"
    ):
        find_weights("me/another")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="need the package huggingface_hub"):
        find_weights("me/third")
    for path in ("runs/checkpoint.pt", "./me/gpt", "/me/gpt", "a/b/c/d", "gpt"):
        assert not hub_module.may_be_repository(path)


def test_the_models_have_the_mixin_of_the_hub(hub, models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    TransformerHF.from_pretrained(models / "hub").push_to_hub("me/mixin")
    model = TransformerHF.from_pretrained("me/mixin", revision="main")
    assert model.recorded["class_names"][3] == "digit 3"
    assert build_gpt(GPTSettings("me/mixin"))[1].sha256 == build_gpt(GPTSettings(str(models / "run.pt")))[1].sha256
    tokenizer = VQModelHF.from_pretrained(models / "hub/tokenizer")
    tokenizer.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        tokenizer.post_quant_conv.bias += 1
    tokenizer.save_pretrained(tmp_path / "learned")
    before, same, learned = (
        build_tokenizer(TokenizerSettings(str(path)))[1].sha256
        for path in (models / "hub/tokenizer", tmp_path / "same", tmp_path / "learned")
    )
    assert before == same != learned
    new = TransformerHF(ModelArgs(n_layer=1, n_head=2, dim=16, vocab_size=8, block_size=16))
    new.save_pretrained(tmp_path / "new")
    assert TransformerHF.from_pretrained(tmp_path / "new", image_size=8, downsample_size=2).args == new.args


@pytest.mark.slow
def test_published_sizes_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        models = {"c2i_B_256.pt": GPT_models["GPT-B"](), "vq_ds16_c2i.pt": VQ_models["VQ-16"]()}
    states = {}
    for name, model in models.items():
        # In 16 bits: half of what is to be written, and another format than the models'.
        states[name] = {key: torch.rand(value.shape).bfloat16() for key, value in model.state_dict().items()}
        torch.save(states[name], tmp_path / name)
    sizes = ("--image-size", 256, "--downsample-size", 16, "--tokenizer", tmp_path / "vq_ds16_c2i.pt")
    run("export", tmp_path / "c2i_B_256.pt", tmp_path / "hub", *sizes)
    for name, part in (("c2i_B_256.pt", "hub"), ("vq_ds16_c2i.pt", "hub/tokenizer")):
        run("export", tmp_path / part, tmp_path / "back.pt")
        own, back = states[name], torch.load(tmp_path / "back.pt", weights_only=True)["model"]
        state = load_file(tmp_path / part / "model.safetensors")
        assert own.keys() == back.keys() == state.keys()
        assert all(torch.equal(own[key], back[key]) and torch.equal(own[key], state[key]) for key in own)
        (tmp_path / "back.pt").unlink()
