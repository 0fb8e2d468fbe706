"""The sampler on a device: an interrupted run ends the same, decoding beside it or not, and nearly so in any batch."""

import numpy as np
import pytest

from autoregressive.sample import sample_c2i_ddp
from dataset.image_store import ImageStore
from tests.gpu import COMPILED, ON_GPU_ALONE
from tests.integration.test_sample_c2i_ddp import call, command
from tests.sampling_models import write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.parametrize("changes", [dict(precision="bf16", no_compile=True), pytest.param(dict(), marks=COMPILED)])
def test_an_interrupted_run_ends_the_same(models, tmp_path, monkeypatch, changes):
    arguments = [command(models, tmp_path / folder, per_proc_batch_size=16, **changes) for folder in ("a", "b")]
    call(monkeypatch, arguments[0])
    write, written = ImageStore.write, []

    def write_twice(store, start, images):
        written.append(start)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(store, start, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "write", write_twice)
        with pytest.raises(KeyboardInterrupt):
            call(patch, arguments[1])
    call(monkeypatch, arguments[1])
    a, b = (next((tmp_path / folder).glob("*.npz")).read_bytes() for folder in ("a", "b"))
    assert a == b


@ON_GPU_ALONE
def test_decoding_beside_the_drawing_changes_nothing(models, tmp_path, monkeypatch):
    class Foreground(sample_c2i_ddp.BackgroundDecoder):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.thread.shutdown()
            self.on_gpu = False

    call(monkeypatch, command(models, tmp_path / "a", per_proc_batch_size=16, no_compile=True))
    monkeypatch.setattr(sample_c2i_ddp, "BackgroundDecoder", Foreground)
    call(monkeypatch, command(models, tmp_path / "b", per_proc_batch_size=16, no_compile=True))
    a, b = (next((tmp_path / folder).glob("*.npz")).read_bytes() for folder in ("a", "b"))
    assert a == b


def test_the_batch_size_changes_few_pixels(models, tmp_path, monkeypatch):
    """None on CPUs; on GPUs where two codes are nearly as likely, from which on an image is another one."""
    images = []
    for size in (16, 5):
        folder = tmp_path / str(size)
        call(monkeypatch, command(models, folder, per_proc_batch_size=size, precision="none", no_compile=True))
        images.append(np.load(next(folder.glob("*.npz")))["arr_0"].astype(int))
    same = (np.abs(images[0] - images[1]) <= 1).all((1, 2, 3)).mean()
    assert same > 0.8
