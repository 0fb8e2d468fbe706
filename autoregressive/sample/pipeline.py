"""From labels and uniform numbers to pixels: the GPT draws codes, the tokenizer decodes them."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from autoregressive.models.generate import CodeGenerator, Sampling, compile_repeatably
from autoregressive.models.gpt import Transformer
from autoregressive.models.load import GPTInfo, build_gpt
from autoregressive.models.packed_linear import pack_linears
from autoregressive.sample.options import DTYPES
from pretrained_models.catalogue import find_weights
from tokenizer.tokenizer_image.load import TokenizerInfo, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel, to_uint8
from utils.engine.parallel import forbid_tf32
from utils.program import UserError

# The decoder's activations are large. On the CPU one image is as fast as many, and then rounds the same in any batch.
IMAGES_DECODED_AT_ONCE = {"cpu": 1, "cuda": 32}


class Pipeline:
    """Both models, checked against each other and the flags; `generator` then `decode` make images."""

    gpt: Transformer
    tokenizer: VQModel
    gpt_info: GPTInfo
    tokenizer_info: TokenizerInfo

    def __init__(self, args: argparse.Namespace, device: torch.device, image_size_eval: int | None = None):
        side = args.image_size // args.downsample_size
        self.grid, self.device, self.compile = (side, side), device, args.compile
        self.dtype = DTYPES[args.precision]
        forbid_tf32()
        self.image_size_eval = image_size_eval or args.image_size
        vq_path, gpt_path = find_weights(args.vq_ckpt), find_weights(args.gpt_ckpt)
        self.tokenizer, self.tokenizer_info = build_tokenizer(
            args.vq_model, args.codebook_size, args.codebook_embed_dim, vq_path, args.vq_weights, device
        )
        if self.tokenizer_info.downsample_factor != args.downsample_size:
            factor = self.tokenizer_info.downsample_factor
            raise UserError(
                f"{args.vq_model} makes one code of {factor}x{factor} pixels; give --downsample-size {factor}."
            )
        self.gpt, self.gpt_info = build_gpt(
            args.gpt_model, gpt_path, grid=self.grid, num_classes=args.num_classes, vocab_size=args.codebook_size,
            weights=args.weights, from_fsdp=args.from_fsdp, dtype=self.dtype, device=device,
        )  # fmt: skip
        self._check_tokenizer_is_the_trained_one()
        if device.type == "cpu" and not args.compile:  # which packs them itself
            pack_linears(self.gpt)
        self._decode_images = self._prepare_decoder()

    def generator(self, batch_size: int, sampling: Sampling) -> CodeGenerator:
        tokens = self.grid[0] * self.grid[1]
        try:
            return CodeGenerator(self.gpt, batch_size, tokens, sampling, self.compile)
        except ValueError as error:
            raise UserError(f"{error}; give --cfg-scale 1.") from error

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """Images `(B, size, size, 3)` uint8 of codes `(B, h*w)`, resized as published; waits for the device."""
        images = []
        for part in codes.split(IMAGES_DECODED_AT_ONCE[self.device.type]):
            decoded = self._decode_images(part.view(len(part), *self.grid)).float()
            if decoded.shape[-1] != self.image_size_eval:
                decoded = F.interpolate(decoded, size=(self.image_size_eval,) * 2, mode="bicubic")
            images.append(to_uint8(decoded).permute(0, 2, 3, 1))
        return torch.cat(images).cpu().numpy()

    def _prepare_decoder(self):
        tokenizer, dtype = self.tokenizer, self.dtype
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):  # the codebook stays in float32
            part.to(dtype=dtype, memory_format=layout)

        def decode_images(codes):
            return tokenizer.decode(tokenizer.quantize.lookup(codes).to(dtype))

        return compile_repeatably(decode_images) if self.compile else decode_images

    def _check_tokenizer_is_the_trained_one(self) -> None:
        trained, used = self.gpt_info.tokenizer, self.tokenizer_info
        if (trained.get("hash") or used.sha256) != used.sha256:
            raise UserError(f"{self.gpt_info.checkpoint} was trained on codes of another tokenizer "
                            f"({trained.get('name', 'unnamed')}, sha256 {trained['hash'][:12]}…) than {used}; "
                            "give that tokenizer as --vq-ckpt.")  # fmt: skip
        if (trained.get("weights") or used.weights) != used.weights:
            raise UserError(f"{self.gpt_info.checkpoint} was trained on codes of the tokenizer's {trained['weights']} "
                            f"weights, not {used.weights}; give --vq-weights {trained['weights']}.")  # fmt: skip

    def describe(self) -> str:
        lines = [f"GPT: {self.gpt_info}", f"tokenizer: {self.tokenizer_info}"]
        if not self.gpt_info.grid_known:
            size = self.grid[0] * self.tokenizer_info.downsample_factor
            lines.append(f"warning: {self.gpt_info.checkpoint} does not say at which image size it was trained; "
                         f"{size} is taken from --image-size, and a wrong one gives garbage.")  # fmt: skip
        return "\n".join(lines)
