"""What a tokenizer's training minimises (VQGAN, arXiv 2012.09841): its losses, their weights, the discriminator."""

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.base import QuantizerLosses
from utils.distributed import World
from utils.settings import SettingError, recipe, settings

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Geometric GAN, arXiv 1705.02894: real logits are pushed above 1, fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def logistic_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The original GAN's, arXiv 1406.2661: cross-entropy of telling real from fake."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    return -fake.mean()


def non_saturating_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """-log D(fake), arXiv 1406.2661 section 3: its gradient does not vanish where the discriminator is sure."""
    return F.softplus(-fake).mean()


# "vanilla" and "non-saturating" name the same loss of the discriminator; they differ in the generator's.
DISCRIMINATOR_LOSSES = {
    "hinge": hinge_discriminator_loss,
    "vanilla": logistic_discriminator_loss,
    "non-saturating": logistic_discriminator_loss,
}
GENERATOR_LOSSES = {"hinge": hinge_generator_loss, "non-saturating": non_saturating_generator_loss}


@settings("loss")
class LossSettings:
    reconstruction_loss: str = recipe("l2", "loss of pixels in [-1, 1]", choices=RECONSTRUCTION_LOSSES)
    reconstruction_weight: float = recipe(1.0, "weight of the reconstruction loss", at_least=0)
    perceptual_weight: float = recipe(1.0, "weight of LPIPS; 0: its weights are not needed", at_least=0)
    codebook_weight: float = recipe(1.0, "weight of the codebook loss", at_least=0)
    disc_weight: float = recipe(0.5, "weight of the adversarial loss; 0: no discriminator", at_least=0)
    disc_start: int = recipe(20000, "step at which the discriminator starts, to judge and to learn", at_least=0)
    disc_type: str = recipe("patchgan", "kind of discriminator", choices=("patchgan",))
    disc_dim: int = recipe(64, "channels after the discriminator's first layer, a multiple of 16", at_least=16)
    disc_num_layers: int = recipe(
        3, "layers of the discriminator that widen; each more doubles the side of the patches it judges", at_least=1
    )
    disc_loss: str = recipe("hinge", "loss of the discriminator", choices=DISCRIMINATOR_LOSSES)
    gen_loss: str = recipe("hinge", "adversarial loss of the tokenizer", choices=GENERATOR_LOSSES)
    disc_adaptive_weight: bool = recipe(
        False,
        "scale the adversarial loss so that its gradient at the last layer is as large as that of the other losses",
    )

    def __post_init__(self):
        if self.disc_dim % 16:
            raise SettingError("disc_dim", "--disc-dim", f"must be a multiple of 16, got {self.disc_dim}")

    @property
    def smallest_image(self) -> int:
        """Pixels per side for at least 2×2 judgements of the discriminator."""
        return 4 * 2**self.disc_num_layers


class VQLoss:
    """The tokenizer's loss. `perceptual` is LPIPS, or None where its weight is 0."""

    def __init__(self, settings: LossSettings, perceptual: nn.Module | None, world: World):
        self.settings, self.world, self.perceptual = settings, world, perceptual
        self.reconstruction = RECONSTRUCTION_LOSSES[settings.reconstruction_loss]
        self.generator = GENERATOR_LOSSES[settings.gen_loss]

    def __call__(
        self,
        images: torch.Tensor,
        reconstruction: torch.Tensor,
        quantizer: QuantizerLosses,
        discriminator: nn.Module | None,
        last_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch in [-1, 1] and its terms, unweighted, to log.

        `discriminator` is None before its start: the adversarial term is then not computed. `last_weight` is the
        decoder's last layer, for the adaptive weight.
        """
        terms = {"reconstruction": self.reconstruction(reconstruction.float(), images)}
        loss = self.settings.reconstruction_weight * terms["reconstruction"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images).mean()
            loss = loss + self.settings.perceptual_weight * terms["perceptual"]
        if discriminator is not None:
            terms["generator"] = self.generator(discriminator(reconstruction).float())
            weight = self.settings.disc_weight
            if self.settings.disc_adaptive_weight:
                terms["adaptive_weight"] = adaptive_weight(loss, terms["generator"], last_weight, self.world)
                weight = weight * terms["adaptive_weight"]
            loss = loss + weight * terms["generator"]
        for name, value in quantizer._asdict().items():
            if value is not None:
                terms[name] = value
                loss = loss + (self.settings.codebook_weight * value if name == "codebook" else value)
        return loss, terms


def adaptive_weight(
    loss: torch.Tensor, generator: torch.Tensor, last_weight: torch.Tensor, world: World
) -> torch.Tensor:
    """Makes the adversarial gradient at the last layer as large as the others' (VQGAN, eq. 7), 10,000 at most.

    Gradients are averaged over the ranks first, so that their number does not change the weight.
    """
    gradients = [torch.autograd.grad(term, last_weight, retain_graph=True)[0].float() for term in (loss, generator)]
    ours, adversarial = (world.sum(gradient.contiguous()).norm() for gradient in gradients)
    return (ours / (adversarial + 1e-4 * world.size)).clamp(0, 1e4)


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004): judges overlapping patches of an image, 70×70 pixels each with 3 layers.

    (B, 3, H, W) images in [-1, 1] -> (B, 1, h, w) logits: above 0 for real. Group norm takes the place of the
    original's batch norm: a judgement then depends on its image alone, so that neither the number of processes nor
    micro-batches change the training, and real images cannot tell on generated ones.
    """

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
