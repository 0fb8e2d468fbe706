"""LPIPS, the learned perceptual distance between images (Zhang et al., arXiv 1801.03924), version 0.1 on VGG-16.

Its weights are two public files, fetched and checked once, or named by the user: torchvision's VGG-16 and the five
linear layers of the authors. Nothing here is trained, and there is no dropout to switch off.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from pretrained_models.catalogue import FOLDER
from utils.checkpoint import read_checkpoint
from utils.distributed import World
from utils.download import download
from utils.program import UserError
from utils.settings import option, settings

LPIPS_FOLDER = FOLDER / "lpips"
SMALLEST_IMAGE = 16  # pixels a side, for one position in the last stage
TAPS = (3, 8, 15, 22, 29)  # the last ReLU of each of VGG-16's five stages
CHANNELS = (64, 128, 256, 512, 512)  # of the five stages


@dataclass(frozen=True)
class Download:
    name: str
    url: str
    sha256: str  # or its first digits, where only those are published


VGG16 = Download("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
LINEAR = Download(
    "lpips_v0.1_vgg.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


@settings("LPIPS")
class LPIPSSettings:
    """Where its weights lie, which are the same public ones everywhere."""

    lpips_vgg_path: str | None = option(None, "torchvision's VGG-16 weights; default: fetched once, 528 MB")
    lpips_linear_path: str | None = option(None, "LPIPS 0.1's linear layers for VGG-16; default: fetched once, 7 KB")


class LPIPS(nn.Module):
    """Distance of two batches of images in [-1, 1]: (B, 3, H, W) twice -> (B,) float32; H and W at least 16."""

    def __init__(self):
        from torchvision.models import vgg  # which a training without LPIPS does not need

        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])[
            :-1
        ]  # VGG-16's convolutions (arXiv 1409.1556), less the last pooling
        self.linear = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in CHANNELS)
        # ImageNet's mean and deviation, moved to images in [-1, 1] and rounded as published
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = self.unit_features(reference)
        distance = 0.0
        for linear, ours, theirs in zip(self.linear, self.unit_features(images), expected, strict=True):
            weight = linear.weight.float().flatten()  # one number a channel
            distance = distance + torch.einsum("bchw,c->bhw", (ours - theirs).square(), weight).mean(dim=(1, 2))
        return distance

    def unit_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The five stages' activations, of length 1 at each position, in float32."""
        x = (images - self.shift) / self.scale
        stages = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in TAPS:
                stages.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return stages


def load_lpips(settings: LPIPSSettings, world: World) -> LPIPS:
    """LPIPS on the world's device; a file that is not named is fetched once a machine, into pretrained_models/lpips.

    Raises `UserError` for files of something else, and where nothing can be fetched.
    """
    vgg_path, linear_path = settings.lpips_vgg_path, settings.lpips_linear_path
    if world.local_rank == 0:
        for path, weights in ((vgg_path, VGG16), (linear_path, LINEAR)):
            if path is None:
                fetch(weights)
    world.barrier()
    return read_lpips(vgg_path or LPIPS_FOLDER / VGG16.name, linear_path or LPIPS_FOLDER / LINEAR.name).to(world.device)


def read_lpips(vgg_path: str | Path, linear_path: str | Path) -> LPIPS:
    convolutions, linear = read_checkpoint(vgg_path), read_checkpoint(linear_path)
    weights = {name: value for name, value in convolutions.items() if name.startswith("features.")}
    weights |= {f"linear.{i}.weight": linear.get(f"lin{i}.model.1.weight") for i in range(len(CHANNELS))}
    model = LPIPS()
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{vgg_path} and {linear_path} are not torchvision's VGG-16 and LPIPS 0.1's linear layers for it; "
            "remove --lpips-vgg-path and --lpips-linear-path to fetch both."
        ) from error
    return model


def fetch(weights: Download, folder: Path = LPIPS_FOLDER) -> Path:
    """Download a file unless it is there."""
    remedy = f"put a good {weights.name} into {folder} by hand, or use --perceptual-weight 0"
    return download(weights.url, folder / weights.name, remedy, digest=weights.sha256)
