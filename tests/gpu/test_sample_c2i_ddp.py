"""Sampling on a GPU: an interrupted run ends the same."""

import pytest
import torch

from dataset.image_store import ImageStore
from tests.integration.test_sample_c2i_ddp import call, command
from tests.sampling_models import write_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.parametrize("changes", [dict(), dict(no_compile=True), dict(precision="none")])
def test_on_a_gpu_an_interrupted_run_ends_the_same(models, tmp_path, monkeypatch, changes):
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
