"""Reconstructing a folder: every image once in any world, scores that follow from the files, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dataset.crops import center_crop
from dataset.image_folder import list_image_folder, load_rgb
from tests.processes import run_main
from tests.tiny_tokenizer import smaller_tokenizer, tiny_images
from tokenizer.tokenizer_image import lpips, reconstruct, vq_model
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_model import to_uint8

CONFIG = {"vq_model": "VQ-Tiny", "codebook_size": 64, "codebook_embed_dim": 4}
IMAGES = 11  # divides neither by the batch nor by the ranks


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_images(tmp_path_factory.mktemp("images") / "held-out", IMAGES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.pt"
    model = smaller_tokenizer(codebook_size=64, codebook_embed_dim=4)
    raw = model.state_dict()
    averaged = {name: value + 0.01 * torch.randn_like(value) for name, value in raw.items()}
    torch.save({"model": raw, "ema": averaged, "config": CONFIG}, path)
    return path


def run(images, tokenizer, results, *flags, world_size=1, **changes) -> list[int]:
    settings = {
        "--data-path": images,
        "--vq-ckpt": tokenizer,
        "--vq-model": "VQ-Tiny",
        "--codebook-size": 64,
        "--codebook-embed-dim": 4,
        "--image-size": 32,
        "--per-proc-batch-size": 3,
        "--num-workers": 0,
        "--sample-dir": results / "out",
    }
    for change in changes.values():
        settings |= change

    def main():
        vq_model.VQ_models["VQ-Tiny"] = smaller_tokenizer
        reconstruct.main()

    arguments = [*flags, *(str(word) for pair in settings.items() for word in pair)]
    return run_main(main, arguments, world_size, results / "log")


def test_npz_scores_and_picture(images, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(vq_model.VQ_models, "VQ-Tiny", smaller_tokenizer)
    assert run(images, tokenizer, tmp_path, "--save-originals") == [0]
    base = tmp_path / "out/VQ-Tiny-held-out-size-32-size-32"
    found = np.load(f"{base}.npz", allow_pickle=False)["arr_0"]
    originals = np.load(f"{base}-originals.npz", allow_pickle=False)["arr_0"]
    folder = list_image_folder(images)
    expected = np.stack([center_crop(load_rgb(folder.path(image)), 32) for image in range(IMAGES)])
    assert np.array_equal(originals, expected)

    model, _ = build_tokenizer(TokenizerSettings(str(tokenizer)))
    with torch.no_grad():
        decoded, _, codes = model(torch.from_numpy(expected).permute(0, 3, 1, 2).float() / 127.5 - 1)
    close = np.abs(found.astype(int) - to_uint8(decoded).permute(0, 2, 3, 1).numpy()) <= 1
    assert close.all()

    report = json.loads(base.with_name(base.name + ".settings.json").read_text())
    scores, pairs = report["scores"], list(zip(originals, found, strict=True))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    similarity = [structural_similarity(a, b, channel_axis=-1, **window) for a, b in pairs]
    assert scores["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]), abs=1e-4)
    assert scores["ssim"] == pytest.approx(np.mean(similarity), abs=1e-4)
    assert scores["code_usage"] == len(codes.unique()) / 64
    assert "lpips" not in scores
    assert report["images"] == IMAGES
    assert report["settings"]["tokenizer"]["weights"] == "ema"
    with Image.open(f"{base}.png") as picture:
        assert picture.size == (8 * 32, 2 * 32)
        assert np.array_equal(np.asarray(picture)[:32, :32], originals[0])
        assert np.array_equal(np.asarray(picture)[32:, :32], found[0])
    said = (tmp_path / "log").read_text()
    assert "ema weights" in said
    assert f"evaluate.sh {base}-originals.npz {base}.npz" in said


def test_two_processes_count_every_image_once(images, tokenizer, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert run(images, tokenizer, tmp_path / "one") == [0]
    assert run(images, tokenizer, tmp_path / "two", world_size=2) == [0, 0]
    name = "out/VQ-Tiny-held-out-size-32-size-32"
    a, b = (json.loads((tmp_path / place / f"{name}.settings.json").read_text()) for place in ("one", "two"))
    assert a["scores"] == pytest.approx(b["scores"], abs=1e-9)
    assert (tmp_path / "one" / f"{name}.npz").read_bytes() == (tmp_path / "two" / f"{name}.npz").read_bytes()


def test_other_size_for_evaluation_and_raw_weights(images, tokenizer, tmp_path):
    size = {"--image-size-eval": 16, "--weights": "raw"}
    assert run(images, tokenizer, tmp_path, more=size) == [0]
    path = tmp_path / "out/VQ-Tiny-held-out-size-32-size-16.npz"
    assert np.load(path, allow_pickle=False)["arr_0"].shape == (IMAGES, 16, 16, 3)
    assert "raw weights" in (tmp_path / "log").read_text()


def test_results_are_reported_again_and_never_mixed(images, tokenizer, tmp_path):
    assert run(images, tokenizer, tmp_path) == [0]
    result = tmp_path / "out/VQ-Tiny-held-out-size-32-size-32.npz"
    written = result.stat().st_mtime_ns
    assert run(images, tokenizer, tmp_path) == [0]
    assert result.stat().st_mtime_ns == written
    assert run(images, tokenizer, tmp_path, more={"--weights": "raw"}) == [2]
    assert (
        "was made by another run with other settings: tokenizer.weights (ema there, raw here)"
        in (tmp_path / "log").read_text()
    )
    assert "give another --name" in (tmp_path / "log").read_text()
    assert run(images, tokenizer, tmp_path, "--save-originals") == [0]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".json", ".npz", ".npz", ".png"]


def test_lpips_when_asked_for(images, tokenizer, tmp_path):
    torch.manual_seed(0)
    state = LPIPS().state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("features")}, tmp_path / "vgg.pth")
    linear = {f"lin{i}.model.1.weight": state[f"linear.{i}.weight"].abs() for i in range(5)}
    torch.save(linear, tmp_path / "linear.pth")
    files = {"--lpips-vgg-path": tmp_path / "vgg.pth", "--lpips-linear-path": tmp_path / "linear.pth"}
    assert run(images, tokenizer, tmp_path, "--lpips", more=files) == [0]
    report = json.loads((tmp_path / "out/VQ-Tiny-held-out-size-32-size-32.settings.json").read_text())
    pair = (np.load(tmp_path / "out/VQ-Tiny-held-out-size-32-size-32.npz", allow_pickle=False)["arr_0"], None)
    folder = list_image_folder(images)
    originals = np.stack([center_crop(load_rgb(folder.path(image)), 32) for image in range(IMAGES)])
    a, b = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1 for pixels in (pair[0], originals))
    with torch.no_grad():
        expected = lpips.read_lpips(tmp_path / "vgg.pth", tmp_path / "linear.pth")(a, b).mean().item()
    assert report["scores"]["lpips"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--vq-ckpt": "/nowhere.pt"}, "there is no checkpoint"),
        ({"--vq-ckpt": "vq_ds16_c2i.pt"}, "vq_ds16_c2i.pt"),
        ({"--data-path": "/nowhere"}, "there is no folder"),
        ({"--image-size": 30}, "not a multiple of 4"),
        ({"--image-size": 8}, "SSIM's window"),
        ({"--codebook-size": 32}, "--codebook-size (64 there, 32 here)"),
        ({"--vq-model": "VQ-8"}, "--vq-model (VQ-Tiny there, VQ-8 here)"),
        ({"--per-proc-batch-size": 0}, "--per-proc-batch-size must be at least 1"),
        ({"--image-size-eval": 10**8}, "a batch of 3 images of 100,000,000 px takes"),
    ],
    ids=str,
)
def test_refusals(change, sentence, images, tokenizer, tmp_path):
    assert run(images, tokenizer, tmp_path, more=change) == [2]
    said = (tmp_path / "log").read_text()
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_too_small_for_lpips(images, tokenizer, tmp_path):
    assert run(images, tokenizer, tmp_path, "--lpips", more={"--image-size-eval": 12}) == [2]
    assert "less than the 16 pixels that LPIPS needs" in (tmp_path / "log").read_text()


def test_results_of_other_files_are_not_taken_for_ours(tokenizer, tmp_path):
    folder = tiny_images(tmp_path / "images", 8)
    assert run(folder, tokenizer, tmp_path) == [0]
    (folder / "class_0/00.png").write_bytes((folder / "class_1/01.png").read_bytes() + b"longer")
    assert run(folder, tokenizer, tmp_path) == [2]
    assert "files_sha256" in (tmp_path / "log").read_text()


def test_a_broken_image_leaves_nothing_under_a_final_name(images, tokenizer, tmp_path):
    folder = tiny_images(tmp_path / "images", 8)
    (folder / "class_1/05.png").write_bytes(b"not an image")
    assert run(folder, tokenizer, tmp_path) == [2]
    assert "cannot be read as an image" in (tmp_path / "log").read_text()
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".partial"]
