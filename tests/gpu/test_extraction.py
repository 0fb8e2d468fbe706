"""Extraction on a device: how many codes stay those of float32 on the CPU, and an interrupted run ends the same."""

import pytest
import torch

from dataset.code_store import open_store
from dataset.extraction_job import Job
from tests.gpu import COMPILED
from tests.tiny_extraction import CODEBOOK, arguments, contents, extract, make_images, make_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.precision import autocast, forbid_tf32

EQUAL = {"none": 0.999, "tf32": 0.97, "bf16": 0.80}  # share of codes, at least, with random weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extraction")
    make_images(folder / "images")
    make_tokenizer(folder / "vq.pt")
    return folder


@pytest.mark.parametrize("precision", EQUAL)
def test_share_of_codes_that_are_those_of_float32(device, precision, figure):
    torch.manual_seed(0)
    model = VQ_models["VQ-Tiny"](codebook_size=CODEBOOK).eval()
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 8, 8) * 2 - 1, 64, mode="bicubic").clamp(-1, 1)
    expected = model.encode_indices(images)
    model.to(device, memory_format=torch.channels_last)
    forbid_tf32()
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    with autocast(device, precision):
        codes = model.encode_indices(images.to(device).contiguous(memory_format=torch.channels_last))
    equal = (codes.cpu() == expected).double().mean().item()
    figure(f"codes equal to those of float32 on the CPU, {precision}, random weights", 100 * equal, "%")
    assert equal >= EQUAL[precision]


@pytest.mark.parametrize(
    "flags",
    [("--precision", "tf32", "--no-compile"), pytest.param(("--precision", "bf16", "--compile"), marks=COMPILED)],
)
def test_an_interrupted_extraction_ends_the_same(device, folder, tmp_path, monkeypatch, flags):
    commands = [arguments(folder / "images", tmp_path / name, folder / "vq.pt", *flags) for name in ("whole", "parts")]
    extract(monkeypatch, commands[0])
    write, written = Job.write_block, []

    def write_twice(job, *block):
        written.append(block)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(job, *block)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "write_block", write_twice)
        with pytest.raises(KeyboardInterrupt):
            extract(patch, commands[1])
    extract(monkeypatch, commands[1])
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert open_store(next((tmp_path / "parts").glob("*_codes"))).meta.count == 24
