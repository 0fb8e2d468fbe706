"""From labels and uniform numbers to pixels: the GPT draws codes, the tokenizer decodes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from autoregressive.models.generate import CodeGenerator, compile_repeatably
from autoregressive.models.gpt import Transformer
from autoregressive.models.load import GPTInfo, GPTSettings, build_gpt, check_tokenizer
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.parallel import make_generator
from autoregressive.models.sampling import Sampling
from dataset.conditions import conditions_identity, open_conditions, rows_of
from tokenizer.base import ImageTokenizer
from tokenizer.tokenizer_image.load import TokenizerInfo, TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel, to_uint8
from utils.component import identities, load_component
from utils.files import sha256
from utils.precision import DTYPES, PRECISIONS, forbid_tf32
from utils.program import UserError
from utils.settings import identity, option, recipe, settings

# The decoder's activations are large. On the CPU one image is as fast as many, and then rounds the same in any batch.
IMAGES_DECODED_AT_ONCE = {"cpu": 1, "cuda": 32}


@settings("number format and compilation")
class ComputeSettings:
    precision: str | None = recipe(
        None,
        "number format of GPT and tokenizer; none: float32 (default: bf16 on GPUs, none on CPUs)",
        choices=PRECISIONS,
    )
    compile: bool | None = option(
        None, "compile GPT and tokenizer (default: on GPUs, where CUDA graphs are used either way)"
    )
    parallel: int | None = option(
        None,
        "codes drawn in one pass, from guesses of those before them that are then checked: the same images in fewer "
        "passes; 1: one by one (default: what is fastest on CPUs in float32, else 1)",
        at_least=1,
    )

    def precision_on(self, device: torch.device) -> str:
        return self.precision or ("bf16" if device.type == "cuda" else "none")

    def compile_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


class Pipeline:
    """GPT and tokenizer, checked against each other and the flags; `generator` then `decode` make images."""

    gpt: Transformer
    tokenizer: ImageTokenizer
    gpt_info: GPTInfo
    tokenizer_info: TokenizerInfo

    def __init__(
        self,
        gpt: GPTSettings,
        tokenizer: TokenizerSettings,
        compute: ComputeSettings,
        device: torch.device,
        image_size_eval: int | None = None,
    ):
        forbid_tf32()
        self._given, self.device = (gpt, tokenizer, compute), device
        self.precision, self.compile = compute.precision_on(device), compute.compile_on(device)
        self.parallel = compute.parallel
        self.dtype = DTYPES[self.precision]
        self.tokenizer, self.tokenizer_info = build_tokenizer(tokenizer, device)
        name, factor = self.tokenizer_info.name, self.tokenizer_info.downsample_factor
        if gpt.downsample_size not in (None, factor):
            raise UserError(f"{name} makes one code of {factor}x{factor} pixels; give --downsample-size {factor}.")
        gpt = replace(gpt, downsample_size=factor)
        self.gpt, self.gpt_info = build_gpt(gpt, self.tokenizer_info.codebook_size, self.dtype, device)
        check_tokenizer(self.gpt_info.tokenizer, self.tokenizer_info, self.gpt_info.checkpoint)
        self.conditions = open_conditions(gpt.conditions) if gpt.conditions else None
        self.image_size = self.gpt_info.image_size
        self.image_size_eval = image_size_eval or self.image_size
        if device.type == "cpu" and not self.compile:  # which packs them itself
            pack_linears(self.gpt)
        self._decode_images = self._prepare_decoder()

    @property
    def num_classes(self) -> int:
        """How many conditions there are to choose from."""
        return self.gpt.args.num_classes if self.conditions is None else len(self.conditions)

    def condition(self, labels: np.ndarray) -> torch.Tensor:
        """What the GPT's conditioning takes for `labels` `(B,)`."""
        return torch.from_numpy(labels if self.conditions is None else rows_of(self.conditions, labels))

    def generator(self, batch_size: int, sampling: Sampling) -> CodeGenerator:
        draw = load_component(sampling.sampler, "--sampler").make if sampling.sampler else None
        try:
            return make_generator(
                self.gpt, batch_size, self.gpt.args.block_size, sampling, self.parallel, self.compile, draw
            )
        except ValueError as error:
            raise UserError(f"{error}; give --cfg-scale 1.") from error

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """Images `(B, size, size, 3)` uint8 of codes `(B, h*w)`, resized as published; waits for the device."""
        images = []
        for part in codes.split(IMAGES_DECODED_AT_ONCE[self.device.type]):
            decoded = self._decode_images(part.view(len(part), *self.gpt.args.grid)).float()
            if decoded.shape[-1] != self.image_size_eval:
                decoded = F.interpolate(decoded, size=(self.image_size_eval,) * 2, mode="bicubic")
            images.append(to_uint8(decoded).permute(0, 2, 3, 1))
        return torch.cat(images).cpu().numpy()

    def identity(self) -> dict:
        """Everything about the two models that decides the images: every flag, as the files settle it."""
        gpt, args, tokenizer = self.gpt_info, self.gpt.args, self.tokenizer_info
        settled = {
            "gpt_model": gpt.name,
            "weights": gpt.weights,
            "image_size": gpt.image_size,
            "downsample_size": gpt.downsample_size,
            "num_classes": self.num_classes,
            "cls_token_num": args.cls_token_num,
            "vq_model": tokenizer.name,
            "vq_weights": tokenizer.weights,
            "codebook_size": tokenizer.codebook_size,
            "codebook_embed_dim": tokenizer.codebook_embed_dim,
            "precision": self.precision,
            "gpt_sha256": sha256(gpt.checkpoint),
            "gpt_steps": gpt.steps,
            "tokenizer_sha256": tokenizer.sha256,
        }
        if self.device.type != "cpu" or self.compile or self.precision != "none":  # rounding may then differ
            settled |= {"parallel": self.parallel, "compile": self.compile}
        settled |= identities(conditioning=self._given[0].conditioning)
        if self.conditions is not None:
            settled["conditions"] = conditions_identity(self.conditions)
        return {name: value for part in self._given for name, value in identity(part).items()} | settled

    def describe(self) -> str:
        lines = [f"GPT: {self.gpt_info}", f"tokenizer: {self.tokenizer_info}"]
        if not self.gpt_info.grid_known:
            lines.append(
                f"warning: {self.gpt_info.checkpoint} does not say at which image size it was trained; "
                f"{self.image_size} is taken from --image-size. Another size gives garbage."
            )
        return "\n".join(lines)

    def _prepare_decoder(self):
        tokenizer, dtype = self.tokenizer, self.dtype
        if not isinstance(tokenizer, VQModel):  # one of the user's own, whose parts are not known
            return tokenizer.decode_indices
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):  # the codebook stays in float32
            part.to(dtype=dtype, memory_format=layout)

        def decode_images(codes):
            return tokenizer.decode(tokenizer.quantize.lookup(codes).to(dtype))

        return compile_repeatably(decode_images) if self.compile else decode_images


def checkpoint_name(path: str, from_fsdp: bool) -> str:
    """How the published result names call a checkpoint: its file, or the folder of an FSDP export."""
    file = Path(path)
    return file.absolute().parent.name if from_fsdp else file.name.removesuffix(".pth").removesuffix(".pt")
