"""The published tokenizer's arithmetic in plain form, on this program's weights: what others run today.

What the public code of LlamaGen (commit ce98ec4) computes, in the same order and number formats: attention by two
explicit products, x * sigmoid(x), all distances between vectors and codes at once, and in training an entropy term of
weight 0, a record of recent codes that is counted at every step, dropout in LPIPS, and a discriminator with batch norm
that judges and learns with weight 0 until its start.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.base import QuantizerLosses
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_loss import PatchDiscriminator, hinge_discriminator_loss
from tokenizer.tokenizer_image.vq_model import AttnBlock, Decoder, Encoder, ResnetBlock, VectorQuantizer, VQModel
from utils.precision import autocast


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class PublishedResnetBlock(ResnetBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (self.nin_shortcut(x) if self.nin_shortcut else x) + h


class PublishedAttention(AttnBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        batch, channels, height, width = x.shape
        q, k, v = (conv(h).reshape(batch, channels, height * width) for conv in (self.q, self.k, self.v))
        weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k) * channels**-0.5, dim=2)
        attended = torch.bmm(v, weights.permute(0, 2, 1)).reshape(batch, channels, height, width)
        return x + self.proj_out(attended)


class PublishedEncoder(Encoder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class PublishedDecoder(Decoder):
    def features(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return swish(self.norm_out(x))


class PublishedQuantizer(VectorQuantizer):
    def forward(self, latent: torch.Tensor):
        z = F.normalize(torch.einsum("bchw->bhwc", latent).contiguous(), dim=-1)
        vectors, codebook = z.view(-1, z.shape[-1]), F.normalize(self.embedding.weight, dim=-1)
        products = torch.einsum("bd,dn->bn", vectors, codebook.t())
        distances = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * products
        indices = distances.argmin(dim=1)
        quantized, losses = codebook[indices].view(z.shape), QuantizerLosses(None, None, None)
        if self.training:
            self._record(indices)
            codebook_loss = (quantized - z.detach()).square().mean()
            commitment = self.beta * (quantized.detach() - z).square().mean()
            losses = QuantizerLosses(codebook_loss, commitment, self.entropy_ratio * self._entropy(-distances))
        straight_through = z + (quantized - z).detach()
        return torch.einsum("bhwc->bchw", straight_through), losses, indices

    def _record(self, indices: torch.Tensor) -> None:
        """The last 65,536 codes, and how many different ones they are."""
        count = len(indices)
        self.codebook_used[:-count] = self.codebook_used[count:].clone()
        self.codebook_used[-count:] = indices
        self.usage = len(torch.unique(self.codebook_used))

    @staticmethod
    def _entropy(affinity: torch.Tensor) -> torch.Tensor:
        affinity = affinity / 0.01
        p, log_p = F.softmax(affinity, dim=-1), F.log_softmax(affinity + 1e-5, dim=-1)
        mean_p = p.mean(dim=0)
        return (mean_p * (mean_p + 1e-5).log()).sum() - (p * log_p).sum(dim=-1).mean()


PUBLISHED = {
    ResnetBlock: PublishedResnetBlock,
    AttnBlock: PublishedAttention,
    Encoder: PublishedEncoder,
    Decoder: PublishedDecoder,
    VectorQuantizer: PublishedQuantizer,
}


def as_published(model: VQModel) -> VQModel:
    """`model` with the same weights and the published arithmetic, in place."""
    for module in model.modules():
        module.__class__ = PUBLISHED.get(type(module), type(module))
    return model


class PublishedLPIPS(LPIPS):
    """Its dropout stays on, for the public trainer puts it back into training mode."""

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.linear, self.unit_features(images), self.unit_features(reconstructions), strict=True)
        return sum(linear(F.dropout((a - b) ** 2, 0.5)).mean((2, 3), keepdim=True) for linear, a, b in pairs)


class PublishedVQStep:
    """One step of the public tokenizer trainer before the discriminator's start; eager, as it is there by default."""

    def __init__(self, model: VQModel, lpips: PublishedLPIPS, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.model, self.lpips = as_published(model).to(device).train(), lpips.to(device)
        self.discriminator = _with_batch_norm(PatchDiscriminator()).to(device).train()
        parts = (self.model, self.discriminator)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=1e-4, betas=(0.9, 0.95)) for part in parts]

    def __call__(self, images: torch.Tensor) -> float:
        self.optimizers[0].zero_grad()
        with autocast(self.device, self.precision):
            reconstruction, quantizer, _ = self.model(images)
            loss = F.mse_loss(images, reconstruction) + self.lpips(images, reconstruction).mean()
            loss = loss + 0.0 * -self.discriminator(reconstruction.contiguous()).mean() + sum(quantizer)
        self._update(loss, self.model, self.optimizers[0])
        self.optimizers[1].zero_grad()
        with autocast(self.device, self.precision):
            real, fake = self.discriminator(images), self.discriminator(reconstruction.contiguous().detach())
            judged = 0.0 * hinge_discriminator_loss(real, fake)
        self._update(judged, self.discriminator, self.optimizers[1])
        return loss.item() + judged.item()

    @staticmethod
    def _update(loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


def _with_batch_norm(discriminator: PatchDiscriminator) -> PatchDiscriminator:
    for place, module in enumerate(discriminator.main):
        if isinstance(module, nn.GroupNorm):
            discriminator.main[place] = nn.BatchNorm2d(module.num_channels)
        elif isinstance(module, nn.LeakyReLU):
            discriminator.main[place] = nn.LeakyReLU(0.2, inplace=True)
    return discriminator
