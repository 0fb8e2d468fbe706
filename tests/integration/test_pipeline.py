"""The interface for Python: the lines of the guide, pictures while they are drawn, editing, and what it refuses."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.models.parallel import make_generator
from autoregressive.models.sampling import Sampling
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.sample.drawing import GREY, streams
from autoregressive.sample.editing import touched_codes
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.seeds import image_uniforms
from pretrained_models import catalogue
from tests.sampling_models import CODEBOOK, write_models
from utils.files import sha256
from utils.program import UserError

GUIDE = Path(__file__).parents[2] / "docs/python.md"
SAME_PIXELS = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`vq.pt` that says what it is, with averaged weights besides; `run/`, a training run that knows where it lies."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    tokenizer = torch.load(folder / "vq.pt", weights_only=True)
    tokenizer["config"] = {"vq_model": "VQ-Tiny", "codebook_size": CODEBOOK, "codebook_embed_dim": 4}
    tokenizer["ema"] = {name: value + 0.01 for name, value in tokenizer["model"].items()}
    torch.save(tokenizer, folder / "vq.pt")
    gpt = torch.load(folder / "c2i_B_256.pt", weights_only=True)
    gpt["config"]["tokenizer"] = {"name": "VQ-Tiny", "hash": sha256(folder / "vq.pt"), "weights": "raw"}
    gpt["places"] = {"tokenizer": str(folder / "vq.pt"), "images": "nowhere"}
    (folder / "run/checkpoints").mkdir(parents=True)
    torch.save(gpt, folder / "run/checkpoints/0000007.pt")
    (folder / "run/checkpoints/last.pt").symlink_to("0000007.pt")
    return folder


@pytest.fixture(scope="module")
def pipeline(models):
    return Pipeline.from_pretrained(models / "run")


@pytest.fixture
def codes_of(pipeline, monkeypatch):
    """What `pipeline(…)` draws, as codes."""

    def codes_of(*args, **kwargs) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "decode", lambda codes: codes)
            return pipeline(*args, **kwargs)

    return codes_of


def same(first: list[Image.Image], second: list[Image.Image]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask_of(*codes: int) -> np.ndarray:
    """A mask `(16, 16)` of the pixels of these of the 4x4 codes."""
    mask = np.zeros((4, 4), dtype=bool)
    mask.flat[list(codes)] = True
    return mask.repeat(4, 0).repeat(4, 1)


@SAME_PIXELS
def test_the_lines_of_the_guide_draw_what_the_script_draws(models, tmp_path, monkeypatch):
    """As they stand there, with tiny weights under the published names; the script is not told the tokenizer."""
    gpt = torch.load(models / "run/checkpoints/last.pt", weights_only=True)
    model = GPT_models["GPT-Tiny"](block_size=16, grid=(4, 4), num_classes=1000, vocab_size=CODEBOOK)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    gpt["config"] = {key: value for key, value in gpt["config"].items() if key != "class_names"} | {"num_classes": 1000}
    (tmp_path / "npp").mkdir()
    torch.save(gpt | {"model": model.state_dict()}, tmp_path / "npp/c2i_B_256.pt")
    (tmp_path / "vq_ds16_c2i.pt").symlink_to(models / "vq.pt")
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)

    turned = Image.Exif()
    turned[0x0112] = 6  # a phone held upright
    picture(size=(30, 20)).save("photo.jpg", exif=turned)
    parts = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert 'Pipeline.from_pretrained("npp/c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")' in parts[0]
    namespace = {}
    for lines in parts:
        exec(lines, namespace)
    images = namespace["images"]
    assert [image.size for image in images] == [(16, 16)] * 2
    assert np.asarray(namespace["patched"])[-1].tolist() == np.asarray(namespace["square"])[-1].tolist()
    command = ["--gpt-ckpt", "npp/c2i_B_256.pt", "--classes", "golden retriever,387", "--cfg-scale", "2.0"]
    monkeypatch.setattr(sys, "argv", ["sample_c2i", *command])
    sample_c2i.main()
    drawn = np.asarray(Image.open("sample_c2i.png"))[:, -16:]
    assert same(images, [drawn[:16], drawn[18:34]])


def test_images_come_in_the_order_asked(pipeline):
    images = pipeline(["digit 3", 5, np.int64(3)], seed=1, cfg_scale=1)
    assert same(images[:2], [pipeline(3, seed=1, cfg_scale=1)[0], pipeline("digit 5", seed=1, cfg_scale=1)[0]])
    assert not same(images[:1], images[2:])
    assert same(images, pipeline((3, 5, 3), seed=1, cfg_scale=1))
    assert not same(images, pipeline([3, 5, 3], seed=2, cfg_scale=1))
    many = pipeline([index % 10 for index in range(11)], seed=1, cfg_scale=1)  # two batches, the last one filled up
    assert same(images[:2], [many[3], many[5]])


def test_pictures_while_they_are_drawn(pipeline):
    seen = []
    images = pipeline([3, 5], seed=1, callback=seen.append)
    assert [drawing.drawn for drawing in seen][-1] == seen[-1].total == 32
    assert [drawing.finished for drawing in seen] == [False] * (len(seen) - 1) + [True]
    assert same(seen[-1].images, images)
    first = np.asarray(seen[0].images[0])
    rows = seen[0].drawn // 2 // 4 * 4
    assert (first[rows:] == GREY).all()
    assert (first[:rows] != GREY).any()


def test_streams_do_not_disturb_each_other_and_may_be_closed(pipeline):
    given_up = pipeline.stream([1, 2], seed=3)
    assert not next(given_up).finished
    given_up.close()
    first, second = pipeline.stream([3, 5], seed=1), pipeline.stream([7, 8], seed=2)
    assert not next(first).finished
    assert not next(second).finished
    assert same([*first][-1].images, pipeline([3, 5], seed=1))
    assert same([*second][-1].images, pipeline([7, 8], seed=2))


def test_a_run_knows_its_tokenizer_and_which_of_its_weights(models, pipeline):
    assert pipeline.tokenizer_info.checkpoint == str(models / "vq.pt")
    assert pipeline.tokenizer_info.weights == "raw"  # what the GPT was trained with, though there are averaged ones
    assert pipeline.class_names == tuple(f"digit {label}" for label in range(10))
    with pytest.raises(UserError, match="trained on codes of the tokenizer's raw weights.*give vq_weights raw"):
        Pipeline.from_pretrained(models / "run", vq_weights="ema")


def test_the_sampler_for_fid_finds_it_too(models, tmp_path, monkeypatch):
    line = ["--gpt-ckpt", str(models / "run"), "--num-fid-samples", "2", "--image-size-eval", "16", "--sample-dir", "."]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample_c2i_ddp", *line])
    sample_c2i_ddp.main()
    [told] = tmp_path.glob("*.settings.json")
    assert str(models / "vq.pt") in told.read_text()
    assert '"vq_weights": "raw"' in told.read_text()


def test_settings_of_the_models_by_their_names(models):
    made = Pipeline.from_pretrained(
        models / "bare.pt",
        models / "vq.pt",
        device="cpu",
        gpt_model="GPT-Tiny",
        image_size=16,
        num_classes=10,
        vq_weights="raw",
        parallel=4,
        precision="bf16",
    )
    assert (made.parallel, made.precision, made.image_size, made.num_classes) == (4, "bf16", 16, 10)
    assert made.find_classes("") == [(label, str(label)) for label in range(10)]
    assert len(made([1, 2, 3])) == 3


def test_codes_and_back(pipeline):
    images = [picture(0), picture(1, (32, 16)), Image.new("L", (20, 30), 200)]
    codes = pipeline.encode(images)
    assert (codes.shape, codes.dtype) == ((3, 16), torch.int64)
    assert torch.equal(codes[:1], pipeline.encode(images[0]))
    assert [image.size for image in pipeline.decode(codes)] == [(16, 16)] * 3
    assert same(pipeline.decode(codes), pipeline.decode(codes.int().tolist()))
    middle = Image.fromarray(np.asarray(images[1])[:, 8:24])
    assert torch.equal(codes[1:2], pipeline.encode(middle))


def test_codes_outside_of_the_mask_are_kept(pipeline, codes_of):
    image, free = picture(), codes_of([3, 5], seed=1)
    kept = pipeline.encode(image)[0]
    codes = codes_of([3, 5], seed=1, image=image, mask=mask_of(5, 6, 9))
    outside = torch.ones(16, dtype=torch.bool)
    outside[[5, 6, 9]] = False
    assert torch.equal(codes[:, outside], kept[outside].expand(2, -1))
    assert torch.equal(codes_of([3, 5], seed=1, image=image, mask=np.ones((16, 16), bool)), free)
    painted = Image.fromarray(mask_of(5, 6, 9).astype(np.uint8) * 255)
    assert torch.equal(codes_of([3, 5], seed=1, image=image, mask=painted), codes)


@SAME_PIXELS
def test_below_a_kept_part_stands_what_the_model_draws_after_those_codes(models, pipeline, codes_of):
    """Whatever the number of codes per pass; forced at their places one by one, with the same random numbers."""
    image, mask = picture(), mask_of(*range(8, 16))
    known = pipeline.encode(image)[0]
    known[8:] = -1
    sampling = Sampling(cfg_scale=2.0, top_k=10, draw="gumbel")
    generator = make_generator(pipeline.gpt, 2, 16, sampling, 1)
    uniforms = torch.from_numpy(image_uniforms(streams([3, 5]), 16, 7))
    generator.start(torch.tensor([3, 5]), uniforms, known.expand(2, -1))
    for token in range(16):
        generator.step(token)
    for several in (pipeline, Pipeline.from_pretrained(models / "run", parallel=3)):
        images = several([3, 5], seed=7, image=image, mask=mask, cfg_scale=2.0, top_k=10)
        assert same(images, pipeline.decode(generator.codes))


def test_of_several_candidates_the_likeliest_is_kept(pipeline, codes_of):
    image, mask = picture(), mask_of(4, 5)
    sampling = dict(cfg_scale=1.0, temperature=2.0)  # so that they differ
    chosen = codes_of([3, 5], seed=1, image=image, mask=mask, candidates=6, **sampling)
    uniforms = image_uniforms(streams([3, 5]), 6 * 16, 1).reshape(2, 6, 16)
    known = pipeline.encode(image)[0]
    known[[4, 5]] = -1
    for index, label in enumerate((3, 5)):
        generator = make_generator(pipeline.gpt, 6, 16, Sampling(**sampling, draw="gumbel"), 1)
        labels = torch.full((6,), label)
        codes = generator(labels, torch.from_numpy(uniforms[index]), known.expand(6, -1))
        losses = F.cross_entropy(pipeline.gpt(codes, labels)[0].mT, codes, reduction="none")[:, 6:].sum(1)
        assert torch.equal(chosen[index], codes[losses.argmin()])
        assert losses.unique().numel() > 1
        assert torch.equal(codes[0], codes_of(label, seed=1, image=image, mask=mask, **sampling)[0])


def test_an_edit_is_seen_as_it_grows(pipeline):
    drawings = list(pipeline.stream(3, image=picture(), mask=mask_of(5, 13)))
    grey = np.asarray(drawings[0].images[0]) == GREY
    assert grey[12:, 4:8].all()
    assert not grey[12:, 8:].all()
    assert not grey[:12].all(1).any()
    assert drawings[-1].finished


def test_the_script_edits_as_well(models, pipeline, tmp_path, monkeypatch):
    picture().save(tmp_path / "image.png")
    Image.fromarray(mask_of(4, 5)).save(tmp_path / "mask.png")
    line = ["--gpt-ckpt", str(models / "run"), "--classes", "3", "--candidates", "3", "--output", "a.png"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample_c2i", *line, "--image", "image.png", "--mask", "mask.png"])
    sample_c2i.main()
    expected = pipeline(3, image=picture(), mask=mask_of(4, 5), candidates=3)
    assert same(expected, [np.asarray(Image.open("a.png"))[:, -16:]])
    monkeypatch.setattr(sys, "argv", ["sample_c2i", "--gpt-ckpt", "nowhere.pt", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="is a folder; name a file to write to"):  # before anything is read
        sample_c2i.main()
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:100])
    for changes, sentence in (
        (["--image", "nowhere.png"], "no picture nowhere.png"),
        (["--image", "broken.png", "--mask", "mask.png"], "broken.png is no picture that can be read"),
        (["--image", "image.png"], "give --image and --mask"),
        ([], "could tell --candidates apart"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample_c2i", *line, *changes])
        with pytest.raises(UserError, match=sentence):
            sample_c2i.main()


def test_a_code_is_drawn_if_the_mask_touches_one_of_its_pixels():
    mask = np.zeros((40, 64), dtype=bool)
    mask[9, 12], mask[10, 21], mask[:, :12] = True, True, True  # the last lies outside of the middle square
    assert touched_codes(mask, (4, 4)).nonzero()[0].tolist() == [0, 1]
    assert touched_codes(mask, (4, 4)).nonzero()[1].tolist() == [0, 0]
    small = np.eye(2, dtype=bool)
    assert touched_codes(small, (4, 4)).tolist() == np.kron(small, np.ones((2, 2), bool)).tolist()
    one = np.zeros((3, 3), dtype=bool)
    one[1, 1] = True  # the middle third touches the second and third of four
    assert touched_codes(one, (4, 4)).sum() == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(classes=10), "there is no class 10; classes takes labels 0 to 9"),
        (dict(classes="cat"), "'cat' fits no class"),
        (dict(classes=[]), "classes are empty"),
        (dict(classes=[1.5]), "classes takes labels 0 to 9, or names, not 1.5"),
        (dict(classes=None), "classes takes labels 0 to 9, or names, not None"),
        (dict(cfg_scale=0.5), "cfg_scale must be at least 1, got 0.5"),
        (dict(cfg_scale="two"), "cfg_scale must be a number, not 'two'"),
        (dict(top_k=1.5), "top_k must be a whole number, not 1.5"),
        (dict(top_p=float("nan")), "top_p must be above 0 and at most 1"),
        (dict(guidance=2.0), "there is no argument guidance; there are cfg_interval"),
        (dict(seed=-1), "seed must be a whole number from 0"),
        (dict(candidates=0), "candidates must be a whole number from 1"),
        (dict(candidates=2), "could tell candidates apart"),
        (dict(candidates=2, image=picture(), mask=mask_of(*range(8, 16))), "could tell candidates apart"),
        (dict(image=picture()), "give image and mask"),
        (dict(mask=mask_of(1)), "give image and mask"),
        (dict(image="a.png", mask=mask_of(1)), "an image is a PIL image, not str"),
        (dict(image=picture(), mask=mask_of()), "marks nothing to draw"),
        (dict(image=picture(size=(8, 8)), mask=mask_of(1)), "the mask is 16x16 pixels and the image 8x8"),
        (dict(image=picture(), mask=mask_of(1).astype(float)), "bool, not float64"),
        (dict(image=picture(), mask=[[1], [1, 2]]), "a mask is a PIL image or an array"),
        (dict(callback="x"), "callback must be a function that takes a Drawing, not 'x'"),
    ],
)
def test_arguments_that_are_refused(pipeline, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        (pipeline if "callback" in arguments else pipeline.stream)(**dict(classes=3) | arguments)
    assert "--" not in str(refusal.value)


def test_codes_images_and_names_that_are_refused(pipeline, tmp_path):
    turned = picture(size=(30, 20))
    turned.getexif()[0x0112] = 6
    lying = np.ones((20, 30), dtype=bool)
    encode, decode, save, codes = pipeline.encode, pipeline.decode, pipeline.save_pretrained, np.zeros((1, 16), int)
    for call, sentence in (
        (lambda: pipeline(3, image=turned, mask=lying), r"is 30x20 pixels .* 20x30 \(upright: ImageOps.exif_transpose"),
        (lambda: decode(codes + CODEBOOK), "whole numbers from 0 to 63, 16 for each image; these reach from 64 to 64"),
        (lambda: decode(codes - 1), "these reach from -1 to -1"),
        (lambda: decode(codes.astype(float)), "not float64"),
        (lambda: decode(codes[0]), r"have the shape \(images, 16\), not \(16,\)"),
        (lambda: decode(codes[:, :8]), r"not \(1, 8\)"),
        (lambda: decode(codes[:0]), r"not \(0, 16\)"),
        (lambda: decode([[1], [1, 2]]), "codes are a tensor or an array"),
        (lambda: encode([]), "no images to encode"),
        (lambda: encode(5), "an image is a PIL image, not int"),
        (lambda: save(tmp_path / "a", foo=1), "there is no argument foo; there are downsample_size"),
        (lambda: save(tmp_path / "a", weights="xx"), "weights is one of auto, ema, raw, not xx"),
        (lambda: save(tmp_path / "a", private="yes"), "private must be True or False, not 'yes'"),
        (lambda: save(tmp_path / "a", private=True), "private is for the repository of push"),
        (lambda: save(5), "folder must be a name or a path, not 5"),
        (lambda: pipeline.push_to_hub(""), "push '' cannot be a repository of the hub; give ORG/NAME"),
        (lambda: pipeline.push_to_hub(None), "push 'None' cannot be a repository"),
    ):
        with pytest.raises(UserError, match=sentence) as refusal:
            call()
        assert "--" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_drawing_that_failed_does_not_fail_the_next(pipeline):
    with pipeline.lent_generator(1, Sampling()) as generator:
        generator.finite.fill_(False)
    with pipeline.lent_generator(1, Sampling()) as again:
        assert again is generator
        again.check_finite()


def test_weights_that_are_refused(models, tmp_path, monkeypatch):
    other = torch.load(models / "run/checkpoints/last.pt", weights_only=True)
    (tmp_path / "moved/checkpoints").mkdir(parents=True)
    torch.save(other | {"places": {"tokenizer": "gone.pt"}}, tmp_path / "moved.pt")
    for name, arguments, sentence in (
        ("nowhere.pt", {}, "there is no checkpoint nowhere.pt"),
        (tmp_path / "moved", {}, "has no checkpoint yet"),
        (tmp_path / "moved.pt", {}, "lay at gone.pt and is not there; give it as tokenizer"),
        (models / "bare.pt", {}, "does not say where its tokenizer lies; give it as tokenizer"),
        (models / "run", dict(image_size=32), "give the image_size and downsample_size"),
        (models / "run", dict(device="abacus"), "there is no device 'abacus'"),
        (models / "run", dict(device="cuda"), "finds no GPU"),
        (models / "run", dict(device="meta"), "device must be 'cpu' or 'cuda'"),
        (models / "run", dict(size=3), "there is no argument size; there are"),
        (models / "run", dict(precision="bf15"), "precision is one of none, bf16, fp16, not bf15"),
        (None, {}, "model must be a name or a path"),
        (5, {}, "model must be a name or a path, not 5"),
        ("", {}, "model must be a name or a path, not ''"),
    ):
        with pytest.raises(UserError, match=sentence) as refusal:
            Pipeline.from_pretrained(name, **arguments)
        assert "--" not in str(refusal.value)


def test_a_model_without_a_null_class_says_so_in_words_of_the_interface(models, tmp_path):
    gpt = torch.load(models / "run/checkpoints/last.pt", weights_only=True)
    model = GPT_models["GPT-Tiny"](block_size=16, grid=(4, 4), num_classes=10, vocab_size=64, class_dropout_prob=0.0)
    torch.save(gpt | {"model": model.state_dict()}, tmp_path / "gpt.pt")
    pipeline = Pipeline.from_pretrained(tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="no null class .* give cfg_scale 1"):
        pipeline(3)
    assert len(pipeline(3, cfg_scale=1)) == 1


def test_published_weights_are_downloaded_when_asked(monkeypatch, tmp_path):
    from pretrained_models import download

    asked = []
    monkeypatch.setattr(download, "download", asked.append)
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="has not been downloaded"):
        Pipeline.from_pretrained("npp/c2i_B_256.pt", download=True)
    assert asked == ["npp/c2i_B_256.pt", "vq_ds16_c2i.pt"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="need the package huggingface_hub"):
        download.download("npp/c2i_B_256.pt", tmp_path)


def test_what_decides_images_is_recorded_where_rounding_does(models, pipeline):
    assert "parallel" not in pipeline.identity()
    assert Pipeline.from_pretrained(models / "run", precision="bf16", parallel=2).identity()["parallel"] == 2
