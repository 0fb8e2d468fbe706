"""PatchGAN (pix2pix, arXiv 1611.07004): judges overlapping patches of an image, 70×70 pixels each.

Group norm takes the place of the original's batch norm: a judgement then depends on its image alone, so that neither
the number of processes nor micro-batches change the training, and real images cannot tell on generated ones.
"""

import torch
from torch import nn


def smallest_image(layers: int) -> int:
    """Pixels a side for at least 2×2 judgements of a discriminator of so many layers."""
    return 4 * 2**layers


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) images in [-1, 1] -> (B, 1, h, w) logits: above 0 for real."""

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            out = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            convolution = nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False)
            blocks += [convolution, nn.GroupNorm(32, out), nn.LeakyReLU(0.2)]
            width = out
        self.main = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # as published

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images)
