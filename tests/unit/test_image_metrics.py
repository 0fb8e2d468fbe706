"""PSNR, SSIM and LPIPS against scikit-image and the lpips package; code usage; fetching LPIPS's weights."""

import hashlib
import math
import warnings
from pathlib import Path

import lpips as reference_lpips
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenizer.tokenizer_image import lpips
from tokenizer.tokenizer_image.lpips import LPIPS, Download, LPIPSSettings, fetch, load_lpips, read_lpips
from tokenizer.tokenizer_image.metrics import ReconstructionScores, code_usage, psnr, ssim
from utils.distributed import World
from utils.files import sha256
from utils.program import UserError

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def pair():
    """Two batches (5, 3, 40, 33) uint8: smooth images, and the same with noise of growing strength."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(5, 3, 5, 4, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=(40, 33), mode="bicubic").clamp(0, 255)
    noise = torch.randn(images.shape, generator=generator) * torch.tensor([0.5, 2, 8, 30, 90]).view(-1, 1, 1, 1)
    return images.to(torch.uint8), (images + noise).clamp(0, 255).to(torch.uint8)


def as_numpy(images):
    return images.permute(0, 2, 3, 1).numpy()


def test_psnr_equals_scikit_image(pair):
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(*map(as_numpy, pair), strict=True)]
    assert psnr(pair[1], pair[0]).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_equals_scikit_image(pair):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [
        structural_similarity(a, b, channel_axis=-1, **settings) for a, b in zip(*map(as_numpy, pair), strict=True)
    ]
    assert ssim(pair[1], pair[0]).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(pair[0], pair[0]).tolist() == pytest.approx([1] * 5)


@pytest.fixture(scope="module")
def random_lpips(tmp_path_factory):
    """The lpips package's model with random weights, and ours with the same, through the public files' layouts."""
    torch.manual_seed(0)
    with warnings.catch_warnings():  # of torchvision, about how the package calls it
        warnings.simplefilter("ignore")
        theirs = reference_lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    state = theirs.state_dict()
    folder = tmp_path_factory.mktemp("lpips")
    vgg = {f"features.{name.split('.', 2)[2]}": value for name, value in state.items() if name.startswith("net.slice")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg.pth")
    torch.save({name: value for name, value in state.items() if name.startswith("lin")}, folder / "linear.pth")
    return theirs, folder / "vgg.pth", folder / "linear.pth"


def test_lpips_equals_the_lpips_package(pair, random_lpips):
    theirs, vgg, linear = random_lpips
    ours = load_lpips(LPIPSSettings(str(vgg), str(linear)), ALONE)
    a, b = (pixels.float() / 127.5 - 1 for pixels in pair)
    with torch.no_grad():
        expected = theirs(a, b).flatten()
        found = ours(a, b)
    assert expected.abs().max() > 1e-3  # random weights do tell the images apart
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_lpips_is_the_same_in_training_and_differentiable(random_lpips):
    ours = read_lpips(*random_lpips[1:])
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    images[:, :, :16] = 0  # where features vanish, gradients must not be NaN
    images.requires_grad_()
    reference = torch.rand(1, 3, 32, 32) * 2 - 1
    in_train, in_eval = ours.train()(images, reference), ours.eval()(images, reference)
    assert torch.equal(in_train, in_eval)
    in_train.sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_lpips_refuses_other_files(random_lpips, tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torchvision's VGG-16"):
        read_lpips(tmp_path / "other.pth", random_lpips[2])
    with pytest.raises(UserError, match="not torchvision's VGG-16"):
        read_lpips(random_lpips[1], tmp_path / "other.pth")


def test_the_published_linear_layers_are_the_ones_expected(random_lpips):
    path = Path(reference_lpips.__file__).parent / "weights/v0.1/vgg.pth"
    assert sha256(path) == lpips.LINEAR.sha256
    ours = read_lpips(random_lpips[1], path)
    assert all((linear.weight >= 0).all() for linear in ours.linear)


def test_fetch_checks_the_hash(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    with pytest.raises(UserError, match="is not the file expected"):
        fetch(Download("w.pth", source.as_uri(), "0" * 64), tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []
    good = Download("w.pth", source.as_uri(), hashlib.sha256(b"weights").hexdigest()[:8])
    assert fetch(good, tmp_path / "folder").read_bytes() == b"weights"
    source.unlink()
    assert fetch(good, tmp_path / "folder").exists()  # it is not asked for again
    with pytest.raises(UserError, match="--perceptual-weight 0"):
        fetch(Download("other.pth", source.as_uri(), ""), tmp_path / "folder")


def test_named_files_are_not_fetched(random_lpips, monkeypatch):
    monkeypatch.setattr(lpips, "fetch", lambda download: pytest.fail("fetched"))
    assert isinstance(load_lpips(LPIPSSettings(*map(str, random_lpips[1:])), ALONE), LPIPS)


def test_code_usage_and_perplexity():
    assert code_usage(torch.tensor([0, 5, 5, 0])) == (0.5, pytest.approx(2))
    assert code_usage(torch.tensor([7, 0, 0, 0])) == (0.25, pytest.approx(1))
    assert code_usage(torch.full((8,), 3)) == (1.0, pytest.approx(8))
    usage, perplexity = code_usage(torch.tensor([3, 1]))
    assert perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_scores_are_means_over_images_whatever_the_batches(pair):
    codes = torch.tensor([[0, 1], [1, 2], [2, 2], [3, 3], [3, 3]])
    whole, parts = (ReconstructionScores(8, torch.device("cpu")) for _ in range(2))
    whole.add(*pair, codes)
    for start, end in ((0, 2), (2, 5)):
        parts.add(pair[0][start:end], pair[1][start:end], codes[start:end])
    result = whole.result(ALONE)
    assert result == pytest.approx(parts.result(ALONE))
    assert result["psnr"] == pytest.approx(psnr(pair[1], pair[0]).mean().item())
    assert result["code_usage"] == 0.5
    assert np.isfinite(list(result.values())).all()
