"""Sampling of 96 images in batches of eight, for FID."""

from pathlib import Path

from autoregressive.sample import sample_c2i_ddp
from tests.sampling_models import flags, write_models
from tests.soak.killing import Subject


def sampling(folder: Path) -> Subject:
    """`folder` gets the models."""
    write_models(folder)
    settings = {"num_fid_samples": 96, "image_size_eval": 16, "per_proc_batch_size": 8}
    return Subject(
        main=sample_c2i_ddp.main,
        command=lambda results: flags(folder, **settings, sample_dir=results),
        contents=contents,
    )


def contents(results: Path) -> dict:
    """Images and labels, the preview, and that nothing unfinished is left; the report tells of batches and seconds."""
    return {path.name: path.suffix != ".json" and path.read_bytes() for path in results.iterdir()}
