"""How near reconstructions are to their images: PSNR, SSIM, LPIPS, and how much of the codebook is used."""

import torch
from torch import nn
from torch.nn import functional as F

from utils.distributed import World

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


def code_counts(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code occurs in `codes` (any shape): (codebook_size,) int64. Waits for no GPU, as bincount does."""
    codes = codes.flatten()
    return torch.zeros(codebook_size, dtype=torch.int64, device=codes.device).scatter_add_(
        0, codes, torch.ones_like(codes, dtype=torch.int64)
    )


class ReconstructionScores:
    """Sums over the images of this rank; `result` is the mean over all ranks' images."""

    def __init__(self, codebook_size: int, device: torch.device, lpips: nn.Module | None = None):
        self.lpips = lpips
        names = ["psnr", "ssim"] + (["lpips"] if lpips else [])
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self.images = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def add(self, images: torch.Tensor, reconstructions: torch.Tensor, codes: torch.Tensor) -> None:
        """Two (B, 3, H, W) uint8 batches and the codes, of any shape, that the second was decoded from."""
        self.sums["psnr"] += psnr(reconstructions, images).sum()
        self.sums["ssim"] += ssim(reconstructions, images).sum()
        if self.lpips is not None:
            pair = (2 * pixels.float() / 255 - 1 for pixels in (reconstructions, images))
            self.sums["lpips"] += self.lpips(*pair).double().sum()
        self.images += len(images)
        self.counts += code_counts(codes, len(self.counts))

    def result(self, world: World) -> dict[str, float]:
        """psnr (dB), ssim, lpips if given, code_usage, perplexity; a collective: every rank must call it."""
        images = world.sum(self.images.clone()).item()
        means = {name: world.sum(total.clone()).item() / images for name, total in self.sums.items()}
        usage, perplexity = code_usage(world.sum(self.counts.clone()))
        return {**means, "code_usage": usage, "perplexity": perplexity}
