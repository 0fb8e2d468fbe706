"""Finite scalar quantization (FSQ, arXiv 2309.15505) in place of the learned codebook of VQ-16.

    bash scripts/tokenizer/train_vq.sh --vq-model 'examples/fsq.py:FSQ(levels=(8, 8, 8, 6, 5))' …   15,360 codes

Each channel is bounded and rounded to one of its `levels`; a code is the number that these digits spell.
"""

import math

import torch

from tokenizer.base import QuantizerLosses
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel


class FSQ(VQModel):
    def __init__(self, levels: tuple[int, ...] = (8, 8, 8, 6, 5), **settings):
        sizes = {"codebook_size": math.prod(levels), "codebook_embed_dim": len(levels)}
        super().__init__(ModelArgs(**settings | sizes))
        self.quantize = FiniteScalarQuantizer(levels)


class FiniteScalarQuantizer(torch.nn.Module):
    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        places = [math.prod(levels[:channel]) for channel in range(len(levels))]  # 1, L0, L0·L1, …
        self.register_buffer("levels", torch.tensor(levels).view(-1, 1, 1), persistent=False)
        self.register_buffer("places", torch.tensor(places).view(-1, 1, 1), persistent=False)

    def forward(self, latent):  # (B, C, h, w): straight-through vectors, no losses, codes
        bounded, codes = self.bound(latent), self.nearest(latent)
        return bounded + (self.lookup(codes) - bounded).detach(), QuantizerLosses(), codes.flatten()

    def bound(self, latent):  # in [-1, 1], float32
        return latent.float().tanh()

    def nearest(self, latent):  # (B, h, w) codes; digit of a channel with L levels: 0 … L-1
        digits = ((self.bound(latent) + 1) / 2 * (self.levels - 1)).round().long()
        return (digits * self.places).sum(dim=1)

    def lookup(self, codes):  # (B, C, h, w) vectors in [-1, 1]
        return codes.unsqueeze(1) // self.places % self.levels * 2 / (self.levels - 1) - 1
