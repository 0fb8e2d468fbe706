"""The tokenizer's losses: right values, right signs, and nothing computed that has no weight."""

import pytest
import torch
from torch.nn import functional as F

from tokenizer.base import QuantizerLosses
from tokenizer.tokenizer_image.vq_loss import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    LossSettings,
    PatchDiscriminator,
    VQLoss,
    adaptive_weight,
)
from utils.distributed import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_discriminator_learns_to_tell_real_from_fake(name):
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    DISCRIMINATOR_LOSSES[name](real, fake).backward()
    assert (real.grad < 0).all()  # a step against the gradient raises the logits of real images
    assert (fake.grad > 0).all()


@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_generator_learns_to_pass_for_real(name):
    fake = torch.tensor([-20.0, 0.0, 3.0], requires_grad=True)
    GENERATOR_LOSSES[name](fake).backward()
    assert (fake.grad < 0).all()
    assert fake.grad[0] <= fake.grad[2]  # it does not vanish where the discriminator is sure of a fake
    assert fake.grad[0] == pytest.approx(-1 / 3, abs=1e-6)


def test_values_of_the_adversarial_losses():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])
    assert DISCRIMINATOR_LOSSES["hinge"](real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    cross_entropy = 0.5 * (
        F.binary_cross_entropy_with_logits(real, torch.ones(2))
        + F.binary_cross_entropy_with_logits(fake, torch.zeros(2))
    )
    for name in ("vanilla", "non-saturating"):
        torch.testing.assert_close(DISCRIMINATOR_LOSSES[name](real, fake), cross_entropy)
    assert GENERATOR_LOSSES["hinge"](fake).item() == pytest.approx(1.0)
    passing = F.binary_cross_entropy_with_logits(fake, torch.ones(2))
    torch.testing.assert_close(GENERATOR_LOSSES["non-saturating"](fake), passing)


def test_the_discriminator_judges_each_image_alone():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    size = LossSettings(disc_num_layers=3).smallest_image
    images = torch.rand(3, 3, size, size)
    together = model(images)
    assert together.shape == (3, 1, 2, 2)
    torch.testing.assert_close(together[:1], model(images[:1]), rtol=1e-4, atol=1e-5)
    assert model(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    images, reconstruction = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    return images, reconstruction, QuantizerLosses(torch.tensor(0.2), torch.tensor(0.05), None)


def test_every_weight_is_applied(batch):
    images, reconstruction, quantizer = batch
    weights = LossSettings(
        reconstruction_loss="l1", reconstruction_weight=2.0, perceptual_weight=3.0, disc_weight=0.5, codebook_weight=4.0
    )
    perceptual = lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))  # noqa: E731 - stands in for LPIPS
    judge = lambda image: image.mean(dim=(1, 2, 3)) - 1  # noqa: E731
    loss = VQLoss(weights, perceptual, ALONE)
    quantizer = quantizer._replace(entropy=torch.tensor(0.01))
    total, terms = loss(images, reconstruction, quantizer, judge, None)
    l1 = F.l1_loss(reconstruction, images)
    generator = 1 - reconstruction.mean()
    expected = 2 * l1 + 3 * l1 + 0.5 * generator + 4 * 0.2 + 0.05 + 0.01
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["generator"], generator)
    l2 = VQLoss(LossSettings(), None, ALONE)(images, reconstruction, quantizer, None, None)[1]
    torch.testing.assert_close(l2["reconstruction"], F.mse_loss(reconstruction, images))


def test_terms_without_weight_are_not_computed(batch):
    loss = VQLoss(LossSettings(perceptual_weight=0.0), None, ALONE)
    _, terms = loss(*batch, None, None)
    assert terms.keys() == {"reconstruction", "codebook", "commitment"}
    total, terms = loss(*batch[:2], QuantizerLosses(), None, None)  # of a quantizer without a codebook
    assert terms.keys() == {"reconstruction"}
    assert torch.equal(total, terms["reconstruction"])


def test_adaptive_weight_balances_the_gradients_of_the_last_layer(batch):
    images, reconstruction, quantizer = batch
    last = torch.nn.Conv2d(3, 3, 1, bias=False)
    reconstruction = last(reconstruction)
    judge = lambda image: 5 * image.mean(dim=(1, 2, 3))  # noqa: E731
    weights = LossSettings(disc_weight=0.5, disc_adaptive_weight=True)
    total, terms = VQLoss(weights, None, ALONE)(images, reconstruction, quantizer, judge, last.weight)
    ours = torch.autograd.grad(terms["reconstruction"], last.weight, retain_graph=True)[0].norm()
    adversarial = torch.autograd.grad(terms["generator"], last.weight, retain_graph=True)[0].norm()
    torch.testing.assert_close(terms["adaptive_weight"], ours / (adversarial + 1e-4))
    expected = terms["reconstruction"] + 0.5 * terms["adaptive_weight"] * terms["generator"] + 0.25
    torch.testing.assert_close(total, expected)
    tiny = adaptive_weight(terms["reconstruction"], terms["generator"] * 1e-12, last.weight, ALONE)
    assert tiny <= 1e4
