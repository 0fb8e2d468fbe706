"""A tokenizer small enough to train for a few steps in a test, and a folder of images for it."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.processes import run_main
from tokenizer.tokenizer_image import vq_model, vq_setup, vq_train
from tokenizer.tokenizer_image.vq_loss import PatchDiscriminator

COMMAND = {  # 24 images, batch 8: 3 steps per epoch, 12 in all
    "--vq-model": "VQ-Tiny",
    "--codebook-size": 64,
    "--codebook-embed-dim": 4,
    "--image-size": 32,
    "--epochs": 4,
    "--global-batch-size": 8,
    "--lr": 1e-3,
    "--warmup-epochs": 1,
    "--perceptual-weight": 0,
    "--disc-start": 6,
    "--mixed-precision": "none",
    "--log-every": 2,
    "--ckpt-every": 3,
    "--num-workers": 0,
    "--run-name": "run",
}


def tiny_images(folder: Path, count: int = 24) -> Path:
    """`count` smooth random images of 40×36 pixels in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class_{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40, 36), Image.Resampling.BICUBIC).save(path)
    return folder


def smaller_tokenizer(**settings) -> vq_model.VQModel:
    """Stands in for VQ-Tiny: in a fork, or under monkeypatch."""
    small = {"channels": 8, "z_channels": 8, "num_res_blocks": 1, "norm_groups": 4}
    multiples = {"encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 1, 2]}
    return vq_model.VQModel(vq_model.ModelArgs(**small | multiples | settings))


def smaller_discriminator(channels: int = 64, layers: int = 3) -> PatchDiscriminator:
    return PatchDiscriminator(channels // 4, layers)


def command(images: Path, results: Path, *flags: str, **changes) -> list[str]:
    """The command line of a tiny run; `changes` replace or add flags, given as `{"--flag": value}` under any name."""
    settings = COMMAND | {"--data-path": images, "--results-dir": results}
    for change in changes.values():
        settings |= change
    return ["--scheduler", *flags, *(str(word) for pair in settings.items() for word in pair)]


def train(arguments: list[str], world_size: int = 1, output=None, before=lambda: None) -> list[int]:
    def main():
        vq_model.VQ_models["VQ-Tiny"] = smaller_tokenizer
        vq_setup.PatchDiscriminator = smaller_discriminator
        before()
        vq_train.main()

    return run_main(main, arguments, world_size, output)
