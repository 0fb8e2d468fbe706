"""What a tokenizer's training minimises (VQGAN, arXiv 2012.09841), and what its discriminator does."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.tokenizer_image.vq_model import QuantizerLosses
from utils.distributed import World

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


@dataclass
class LossWeights:
    reconstruction: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    codebook: float = 1.0
    adaptive: bool = False  # times `adaptive_weight`


class VQLoss:
    """The tokenizer's loss. `perceptual` is LPIPS or None; `reconstruction` and `generator` name entries above."""

    def __init__(
        self, weights: LossWeights, reconstruction: str, generator: str, perceptual: nn.Module | None, world: World
    ):
        self.weights, self.world, self.perceptual = weights, world, perceptual
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.generator = GENERATOR_LOSSES[generator]

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
        w = self.weights
        terms = {"reconstruction": self.reconstruction(reconstruction.float(), images)}
        loss = w.reconstruction * terms["reconstruction"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images).mean()
            loss = loss + w.perceptual * terms["perceptual"]
        if discriminator is not None:
            terms["generator"] = self.generator(discriminator(reconstruction).float())
            weight = w.adversarial
            if w.adaptive:
                terms["adaptive_weight"] = adaptive_weight(loss, terms["generator"], last_weight, self.world)
                weight = weight * terms["adaptive_weight"]
            loss = loss + weight * terms["generator"]
        terms |= {name: value for name, value in quantizer._asdict().items() if value is not None}
        loss = loss + w.codebook * quantizer.codebook + quantizer.commitment
        if quantizer.entropy is not None:
            loss = loss + quantizer.entropy
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
