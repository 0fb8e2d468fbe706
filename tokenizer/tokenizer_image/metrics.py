"""How near reconstructions are to their images: PSNR, SSIM, and how much of the codebook is used."""

import torch
from torch.nn import functional as F

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of two (B, 3, H, W) uint8 batches: (B,) float64, in dB; infinite where equal."""
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of two (B, 3, H, W) uint8 batches: (B,) float64; sides of at least 11 pixels.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window of 11×11 with deviation 1.5, K1 = 0.01, K2 = 0.03,
    range 255, windows wholly inside the image; a colour image's value is the mean over its channels.
    """
    x, y = images.double(), reference.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian mean of each window: rows, then columns."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)  # the same for each channel
    x = F.conv2d(x, window, groups=x.shape[1])
    return F.conv2d(x, window.transpose(2, 3), groups=x.shape[1])


def code_usage(counts: torch.Tensor) -> tuple[float, float]:
    """Of how often each code occurred: the share of codes that did, and the perplexity (effective number of codes)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()
