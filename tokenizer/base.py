"""What the program asks of an image tokenizer, whatever is inside it.

Those that exist by name are `VQ_models` in `tokenizer_image/vq_model.py`; `--vq-model FILE.py:NAME` brings one's own.
Images are `(B, 3, H, W)` float in [-1, 1]; codes are int64 in `0 … codebook_size - 1`, in raster order.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch


@runtime_checkable
class ImageTokenizer(Protocol):
    """A module that turns images into a grid of integer codes and back."""

    downsample_factor: int  # pixels that one code covers, per side
    codebook_size: int

    def encode_indices(self, images: torch.Tensor) -> torch.Tensor:
        """Codes `(B, H*W / downsample_factor**2)` of `images`."""

    def decode_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, h*downsample_factor, w*downsample_factor)` of codes `(B, h, w)`."""


@runtime_checkable
class LatentTokenizer(ImageTokenizer, Protocol):
    """One whose `encode_indices` computes latents first: extraction compiles that part, and leaves the choice among the
    codes as it is, whose rounding decides between close ones.
    """

    def latent(self, images: torch.Tensor) -> torch.Tensor:
        """What the codes of `images` are chosen for; `encode_indices` calls it."""


class QuantizerLosses(NamedTuple):
    """Scalars, already weighted by `commit_loss_beta` and `entropy_loss_ratio`; None where there is no such term."""

    codebook: torch.Tensor | None = None
    commitment: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@runtime_checkable
class TrainableTokenizer(ImageTokenizer, Protocol):
    """What `vq_train` needs beside it. Dead codes are revived where `quantize` is a `VectorQuantizer`."""

    last_layer: torch.Tensor  # weight of the decoder's last layer; gradients at it balance the adversarial loss

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, QuantizerLosses, torch.Tensor]:
        """The reconstruction of `images`, the quantizer's losses, and the codes in any shape."""

    def compile_layers(self) -> None:
        """`torch.compile` the encoder and the decoder in place, all but the decoder's last layer."""
