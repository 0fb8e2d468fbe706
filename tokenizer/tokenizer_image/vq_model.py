"""The VQ tokenizer: a convolutional encoder, a codebook of unit vectors, a convolutional decoder.

The layers, their names and their shapes are those of LlamaGen (arXiv 2406.06525), which follow VQGAN (arXiv
2012.09841), so that published checkpoints load strictly. Images are in [-1, 1]; `to_uint8` maps them back to pixels.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.base import QuantizerLosses

USAGE_BUFFER_SIZE = 65536  # of `quantize.codebook_used` in published checkpoints
LOOKUP_ELEMENTS = 1 << 24  # similarities held at a time in the search for the nearest codes: 64 MiB in float32


@dataclass
class ModelArgs:
    """LlamaGen's settings of a tokenizer, and the three that make it small."""

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    encoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256
    dropout_p: float = 0.0
    channels: int = 128
    num_res_blocks: int = 2
    norm_groups: int = 32


class VQModel(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        self.codebook_size, self.codebook_embed_dim = config.codebook_size, config.codebook_embed_dim
        self.downsample_factor = 2 ** (len(config.encoder_ch_mult) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, QuantizerLosses, torch.Tensor]:
        """Reconstruct (B, 3, H, W) images: the reconstruction, the quantizer's losses, the (B·h·w,) codes."""
        quantized, losses, (_, _, indices) = self.encode(images)
        return self.decode(quantized), losses, indices

    def latent(self, images: torch.Tensor) -> torch.Tensor:
        """The (B, embed_dim, h, w) vectors before quantisation; h = H / downsample_factor."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, QuantizerLosses, tuple[None, None, torch.Tensor]]:
        """Quantized (B, embed_dim, h, w) vectors, the losses, and (as LlamaGen packs them) the (B·h·w,) codes."""
        quantized, losses, indices = self.quantize(self.latent(images))
        return quantized, losses, (None, None, indices)

    @torch.no_grad()
    def encode_indices(self, images: torch.Tensor) -> torch.Tensor:
        """The (B, h·w) int64 codes alone, in raster order."""
        return self.quantize.nearest(self.latent(images)).flatten(1)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images of (B, embed_dim, h, w) vectors; the decoder may be in another precision than they."""
        return self.decoder(self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype)))

    def decode_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images of (B, h, w) integer codes."""
        return self.decode(self.quantize.lookup(codes))

    def decode_code(self, codes: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """(B, 3, H, W) images of integer codes of any layout in raster order; `shape` is (B, embed_dim, h, w)."""
        batch, _, height, width = shape
        return self.decode_indices(codes.reshape(batch, height, width))

    @property
    def last_layer(self) -> torch.Tensor:
        return self.decoder.conv_out.weight

    def compile_layers(self) -> None:
        self.encoder.compile(dynamic=False)
        # The last layer stays out of the graph: the adaptive weight asks for its gradient alone.
        self.decoder.features = torch.compile(self.decoder.features, dynamic=False)


class VectorQuantizer(nn.Module):
    """Replaces each vector by the codebook's nearest; both on the unit sphere (improved VQGAN, arXiv 2110.04627)."""

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.beta = config.commit_loss_beta
        self.entropy_ratio = config.entropy_loss_ratio
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        nn.init.normal_(self.embedding.weight)  # any direction is as likely as any other
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        # Published checkpoints carry a record of recent codes under this name. The model does not touch it; training
        # with dead codes revived counts the codes there.
        self.register_buffer("codebook_used", torch.zeros(max(USAGE_BUFFER_SIZE, config.codebook_size)))

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, QuantizerLosses, torch.Tensor]:
        """(B, C, h, w) -> straight-through quantized vectors of that shape, losses, (B·h·w,) codes. In float32."""
        with torch.autocast(latent.device.type, enabled=False):
            unit = F.normalize(latent.float(), dim=1)
            indices = self.nearest(unit)
            quantized = self.lookup(indices)
            losses = QuantizerLosses(
                codebook=F.mse_loss(quantized, unit.detach()),
                commitment=self.beta * F.mse_loss(unit, quantized.detach()),
                entropy=self.entropy_ratio * self.entropy_loss(unit) if self.entropy_ratio else None,
            )
            return unit + (quantized - unit).detach(), losses, indices.flatten()

    @property
    def codebook(self) -> torch.Tensor:
        return F.normalize(self.embedding.weight.float(), dim=-1)  # (codebook_size, C)

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """(B, h, w) codes -> (B, C, h, w) unit vectors."""
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def nearest(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) vectors of any length -> (B, h, w) int64 codes.

        On the unit sphere the smallest distance is the largest inner product, whatever the vector's own length. The
        products are made a block of vectors at a time, in float32: two codes may lie within 1e-4 of each other.
        """
        with torch.autocast(latent.device.type, enabled=False):
            codebook = self.codebook.t()
            vectors = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1]).float()
            blocks = vectors.split(max(1, LOOKUP_ELEMENTS // codebook.shape[1]))
            indices = torch.cat([(block @ codebook).argmax(dim=1) for block in blocks])
        return indices.view(latent.shape[0], *latent.shape[2:])

    def entropy_loss(self, unit: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
        """Mean entropy of the soft assignments less the entropy of their mean (MAGVIT-v2, arXiv 2310.05737, eq. 6):

        falls as each vector commits to one code and as all codes are used. `unit` is (B, C, h, w).
        """
        vectors = unit.permute(0, 2, 3, 1).flatten(0, 2)
        log_p = F.log_softmax(2 * vectors @ self.codebook.t() / temperature, dim=-1)  # -distance² up to a constant
        p = log_p.exp()
        mean_p = p.mean(dim=0)
        return -(p * log_p).sum(dim=-1).mean() + (mean_p * (mean_p + 1e-5).log()).sum()


class Encoder(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        widths = [config.channels * multiple for multiple in config.encoder_ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level, (width, out) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            resample = Downsample(out) if level != last else None
            self.conv_blocks.append(Stage(config, width, out, config.num_res_blocks, level == last, resample))
        self.mid = middle(config, out)
        self.norm_out = group_norm(config, out)
        self.conv_out = nn.Conv2d(out, config.z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        widths = [config.channels * multiple for multiple in reversed(config.decoder_ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(config, widths[0])
        self.conv_blocks = nn.ModuleList()
        for level, (width, out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            resample = Upsample(out) if level != last else None
            self.conv_blocks.append(Stage(config, width, out, config.num_res_blocks + 1, level == 0, resample))
        self.norm_out = group_norm(config, out)
        self.conv_out = nn.Conv2d(out, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.features(z))

    def features(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return F.silu(self.norm_out(x))


class Stage(nn.Module):
    """The blocks of one resolution, each followed by attention where asked for, then the step to the next."""

    def __init__(
        self, config: ModelArgs, width: int, out: int, blocks: int, attention: bool, resample: nn.Module | None
    ):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(config, width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(config, out) for _ in range(blocks if attention else 0))
        self.downsample = resample if isinstance(resample, Downsample) else None
        self.upsample = resample if isinstance(resample, Upsample) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return resample(x) if resample else x


class ResnetBlock(nn.Module):
    def __init__(self, config: ModelArgs, width: int, out: int):
        super().__init__()
        self.norm1 = group_norm(config, width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = group_norm(config, out)
        self.dropout = nn.Dropout(config.dropout_p)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if self.nin_shortcut else x)


class AttnBlock(nn.Module):
    """Self-attention over all positions of the grid, one head."""

    def __init__(self, config: ModelArgs, width: int):
        super().__init__()
        self.norm = group_norm(config, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h·w, C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(config: ModelArgs, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=1e-6)


def middle(config: ModelArgs, width: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(config, width, width), AttnBlock(config, width), ResnetBlock(config, width, width)]
    )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pixels of images in [-1, 1], as the published pipeline rounds them: clamp(127.5·x + 128, 0, 255), truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def VQ_16(**settings) -> VQModel:
    """One code for 16×16 pixels."""
    return VQModel(ModelArgs(**settings))


def VQ_8(**settings) -> VQModel:
    """One code for 8×8 pixels."""
    multiples = {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]}
    return VQModel(ModelArgs(**multiples | settings))


def VQ_Tiny(**settings) -> VQModel:
    """One code for 4×4 pixels, few channels: for tests and for small simple images."""
    multiples = {"encoder_ch_mult": [1, 2, 2], "decoder_ch_mult": [1, 2, 2]}
    small = {"channels": 32, "z_channels": 32, "num_res_blocks": 1, "norm_groups": 8}
    return VQModel(ModelArgs(**multiples | small | settings))


VQ_models = {"VQ-16": VQ_16, "VQ-8": VQ_8, "VQ-Tiny": VQ_Tiny}  # the names that --vq-model knows
