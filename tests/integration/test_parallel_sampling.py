"""Parallel decoding through the samplers: the same files with any window, batch, processes and kills."""

import numpy as np
import pytest
import torch

from autoregressive.sample import sample_c2i, sample_c2i_ddp
from dataset.image_store import ImageStore
from tests.integration.test_sample_c2i_ddp import NAME, call, command
from tests.sampling_models import flags, run_sampler, write_models

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module", params=["inverse-cdf", "gumbel"])
def reference(request, models, tmp_path_factory):
    """The way to draw, and the result of 64 images code by code."""
    folder = tmp_path_factory.mktemp("reference")
    run_sampler(command(models, folder, draw=request.param, parallel=1), folder / "printed")
    return request.param, (folder / f"{NAME}.npz").read_bytes()


@pytest.mark.parametrize(
    ("window", "batch_size", "world_size"), [(8, 1, 1), (5, 7, 1), (16, 32, 1), (8, 7, 2), (None, 1, 2)]
)
def test_images_depend_neither_on_window_nor_batch_nor_world_size(
    models, reference, tmp_path, window, batch_size, world_size
):
    draw, expected = reference
    arguments = command(models, tmp_path, draw=draw, parallel=window, per_proc_batch_size=batch_size)
    run_sampler(arguments, tmp_path / "printed", world_size)
    assert (tmp_path / f"{NAME}.npz").read_bytes() == expected


def test_an_interrupted_run_ends_the_same_with_any_window(models, reference, tmp_path, monkeypatch):
    draw, expected = reference
    write, written = ImageStore.write, []

    def write_thrice(store, start, images):
        written.append(start)
        if len(written) == 4:
            raise KeyboardInterrupt
        write(store, start, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "write", write_thrice)
        with pytest.raises(KeyboardInterrupt):
            call(patch, command(models, tmp_path, draw=draw, parallel=8))
    call(monkeypatch, command(models, tmp_path, draw=draw, parallel=3))
    assert (tmp_path / f"{NAME}.npz").read_bytes() == expected


def test_the_two_ways_to_draw_are_different_results(models, tmp_path, monkeypatch):
    call(monkeypatch, command(models, tmp_path, num_fid_samples=3))
    with pytest.raises(sample_c2i_ddp.UserError, match=r"draw \(inverse-cdf there, gumbel here\)"):
        call(monkeypatch, command(models, tmp_path, num_fid_samples=3, draw="gumbel"))


def test_pictures_are_the_same_with_any_window(models, tmp_path, monkeypatch):
    pictures = []
    for window in (None, 1, 4, 16):
        output = tmp_path / f"{window}.png"
        line = flags(models, columns=2, output=output, parallel=window)
        monkeypatch.setattr("sys.argv", ["sample_c2i", *line])
        sample_c2i.main()
        pictures.append(np.frombuffer(output.read_bytes(), np.uint8))
    assert all(np.array_equal(pictures[0], picture) for picture in pictures)
