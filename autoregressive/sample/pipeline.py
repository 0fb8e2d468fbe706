"""From classes to images: the GPT draws codes, the tokenizer decodes them. The interface for Python, docs/python.md.

pipeline = Pipeline.from_pretrained("npp/c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")
images = pipeline(["golden retriever", 387], seed=0, cfg_scale=2.0)
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.models.generate import CodeGenerator, compile_repeatably
from autoregressive.models.gpt import Transformer
from autoregressive.models.load import GPTInfo, GPTSettings, build_gpt, check_tokenizer
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.parallel import make_generator, rounds_alike
from autoregressive.models.sampling import Sampling
from autoregressive.sample.arguments import as_codes, choose_device
from autoregressive.sample.class_names import class_names, find_classes, label_of
from autoregressive.sample.drawing import Drawing, draw
from autoregressive.sample.editing import MOST_CANDIDATES, as_picture, kept_behind, known_codes
from autoregressive.sample.sources import download_published, tokenizer_of
from dataset.conditions import conditions_identity, open_conditions, rows_of
from dataset.crops import center_crop, to_model_range
from pretrained_models.catalogue import find_weights
from tokenizer.base import ImageTokenizer
from tokenizer.tokenizer_image.load import TOKENIZER_HELP, TokenizerInfo, TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel, to_uint8
from utils.arguments import refuse_unknown, settings_from, speaking_of_arguments, spoken, whole_number
from utils.component import identities, load_component
from utils.precision import DTYPES, PRECISIONS, forbid_tf32
from utils.program import UserError
from utils.settings import MAX_SEED, identity, option, recipe, settings, with_defaults

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
        "codes drawn in one pass, from guesses of those before them that are then checked: fewer passes for the same "
        "images, exactly so on CPUs in float32, elsewhere but for rounding; 1: one by one (default: what is fastest "
        "where images stay exactly the same, else 1)",
        at_least=1,
    )

    def precision_on(self, device: torch.device) -> str:
        return self.precision or ("bf16" if device.type == "cuda" else "none")

    def compile_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


@settings("tokenizer")
class SamplerTokenizerSettings(TokenizerSettings):
    vq_ckpt: str | None = option(
        None, TOKENIZER_HELP + " (default: the one that the checkpoint of the GPT says it belongs to)"
    )


PictureSampling = with_defaults(Sampling, cfg_scale=4.0, top_k=2000, draw="gumbel")


class Pipeline:
    """GPT and tokenizer, checked against each other and the flags."""

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
        gpt = replace(gpt, gpt_ckpt=str(find_weights(gpt.gpt_ckpt)))
        tokenizer = replace(tokenizer, vq_ckpt=tokenizer.vq_ckpt or tokenizer_of(Path(gpt.gpt_ckpt)))
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
        if tokenizer.vq_weights == "auto" and self.gpt_info.tokenizer.get("weights") == "raw":
            # by itself auto means averaged weights where there are any; the GPT learned the codes of others
            self.tokenizer, self.tokenizer_info = build_tokenizer(replace(tokenizer, vq_weights="raw"), device)
        check_tokenizer(self.gpt_info.tokenizer, self.tokenizer_info, self.gpt_info.checkpoint)
        self.conditions = open_conditions(gpt.conditions) if gpt.conditions else None
        self.image_size = self.gpt_info.image_size
        self.image_size_eval = image_size_eval or self.image_size
        if device.type == "cpu" and not self.compile:  # which packs them itself
            pack_linears(self.gpt)
        self._decode_images = self._prepare_decoder()
        self._idle: dict[tuple, CodeGenerator] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        download: bool = False,
        **settings,
    ) -> "Pipeline":
        """The pipeline of trained weights, on a GPU if there is one.

        `model`: a published name, a checkpoint, the folder of a training run, or a folder or repository in the hub's
        form. `tokenizer`: the same; by default the one that `model` says it belongs to. `download` fetches published
        names that are not here yet. `settings` are the fields of `GPTSettings`, `TokenizerSettings` and
        `ComputeSettings`: what a file does not say of itself, `precision`, `compile`, `parallel`. Raises `UserError`.
        """
        with speaking_of_arguments():
            settings |= {"gpt_ckpt": model, "vq_ckpt": tokenizer}
            if not isinstance(model, str | Path) or not str(model):
                raise UserError(f"model must be a name or a path, not {model!r}.")
            if download:
                download_published(str(model), tokenizer and str(tokenizer))
            classes = (GPTSettings, SamplerTokenizerSettings, ComputeSettings)
            refuse_unknown(settings, classes)
            parts = []
            for part in classes:
                names = {field.name for field in dataclasses.fields(part)}
                parts.append(settings_from(part, {name: settings[name] for name in names & settings.keys()}))
            chosen = choose_device(device)
            if chosen.index is not None:
                torch.cuda.set_device(chosen)
            return cls(*parts, chosen)

    def __call__(
        self,
        classes: str | int | Sequence[str | int],
        *,
        seed: int = 0,
        image: Image.Image | None = None,
        mask: Image.Image | np.ndarray | None = None,
        candidates: int = 1,
        callback: Callable[[Drawing], None] | None = None,
        **sampling,
    ) -> list[Image.Image]:
        """An image for each of `classes`, labels or names, in that order; a class named again gets another one.

        `sampling` are the fields of `Sampling`, by default `PictureSampling`'s. Of `image`, cropped to the middle
        square, codes outside of `mask` are kept (white, or true: drawn anew); of several `candidates` the one is kept
        under which the kept codes that follow are likeliest. `callback` is called with a `Drawing` after every row of
        codes. Raises `UserError`.
        """
        if not (callback is None or callable(callback)):
            raise UserError(f"callback must be a function that takes a Drawing, not {callback!r}.")
        drawings = self.stream(classes, seed=seed, image=image, mask=mask, candidates=candidates, **sampling)
        for drawing in drawings:
            if callback is not None:
                callback(drawing)
        return drawing.images

    def stream(
        self,
        classes: str | int | Sequence[str | int],
        *,
        seed: int = 0,
        image: Image.Image | None = None,
        mask: Image.Image | np.ndarray | None = None,
        candidates: int = 1,
        **sampling,
    ) -> Iterator[Drawing]:
        """As `__call__`, a `Drawing` after every row of codes, the last one finished; closing the iterator stops."""
        with speaking_of_arguments():
            labels = self.labels(classes)
            seed = whole_number("seed", seed, 0, MAX_SEED)
            candidates = whole_number("candidates", candidates, 1, MOST_CANDIDATES)
            chosen = settings_from(PictureSampling, sampling)
            drawings = self.drawings(labels, seed, chosen, image, mask, candidates)
        return spoken(drawings)

    def drawings(
        self,
        labels: list[int],
        seed: int,
        sampling: Sampling,
        image: Image.Image | None = None,
        mask: Image.Image | np.ndarray | None = None,
        candidates: int = 1,
    ) -> Iterator[Drawing]:
        """`stream` for those who have settings: its sentences speak of flags."""
        known = known_codes(self, image, mask)
        if candidates > 1 and (known is None or not kept_behind(known).any()):
            raise UserError("nothing is kept behind what is drawn, which could tell --candidates apart; draw one.")
        return draw(self, labels, seed, sampling, known, candidates)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their labels; numbers where there are no names."""
        return tuple(class_names(self.num_classes, self.gpt_info.class_names))

    def labels(self, classes: str | int | Sequence[str | int]) -> list[int]:
        """Labels of one class or several, each a label or a name. Raises `UserError`."""
        several = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
        if not several:
            raise UserError("classes are empty; give a label, a name or a list of them.")
        return [label_of(one, self.class_names, "classes") for one in several]

    def find_classes(self, text: str) -> list[tuple[int, str]]:
        """Labels and names of the classes that fit `text`, best first; similar ones where none does."""
        return find_classes(text, self.class_names)

    @torch.no_grad()
    def encode(self, images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
        """Codes `(B, h*w)` int64 of images, of which the middle square is taken, at the size of the GPT.

        Raises `UserError`.
        """
        several = list(images) if isinstance(images, Iterable) else [images]
        if not several:
            raise UserError("there are no images to encode; give a PIL image or a list of them.")
        codes = []
        for image in several:
            pixels = torch.from_numpy(center_crop(as_picture(image), self.image_size).copy())
            codes.append(self.tokenizer.encode_indices(to_model_range(pixels)[None].to(self.device)).flatten(1).cpu())
        return torch.cat(codes)

    def decode(self, codes: torch.Tensor) -> list[Image.Image]:
        """Images of codes `(B, h*w)`. Raises `UserError` for what are no codes of this tokenizer."""
        codes = as_codes(codes, self.gpt.args.block_size, self.tokenizer_info.codebook_size)
        return [Image.fromarray(image) for image in self.pixels(codes)]

    @property
    def decodes_fewer_rows(self) -> bool:
        """Whether `pixels` takes codes of the first rows alone: compiled, or one's own, decoders may not."""
        return isinstance(self.tokenizer, VQModel) and not self.compile

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

    def save_pretrained(self, folder: str | Path, **flags) -> Path:
        """Write GPT and tokenizer into `folder` in the hub's form, as scripts/export.sh does; returns it.

        `flags` are those of the script. Raises `UserError`.
        """
        from autoregressive.export import save_pretrained  # which few who sample need

        gpt, tokenizer = self.gpt_info, self.tokenizer_info
        settled = {  # what the files may not say
            "tokenizer": tokenizer.checkpoint,
            "gpt_model": self._given[0].gpt_model,
            "num_classes": self.gpt.args.num_classes,
            "image_size": self.image_size,
            "downsample_size": gpt.downsample_size,
            "vq_model": self._given[1].vq_model,
        }
        chosen = {"weights": gpt.weights, "vq_weights": tokenizer.weights} | settled | flags
        return save_pretrained(gpt.checkpoint, folder, **chosen)

    def push_to_hub(self, repository: str, **flags) -> None:
        """Upload GPT and tokenizer to the hub's `repository` ORG/NAME, made if need be. As `save_pretrained`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "weights"), **flags | {"push": str(repository)})

    @contextmanager
    def lent_generator(self, batch_size: int, sampling: Sampling) -> Iterator[CodeGenerator]:
        """`generator`, whose caches and graphs are kept for the next call of the same kind; nobody else has it."""
        kind = (batch_size, sampling)
        idle, self._idle = self._idle, {}
        generator = idle.pop(kind, None)
        idle.clear()  # before another one takes memory
        generator = generator or self.generator(batch_size, sampling)
        generator.finite.fill_(True)  # whatever its last drawing met
        try:
            yield generator
        finally:
            self._idle = {kind: generator}

    @torch.no_grad()
    def pixels(self, codes: torch.Tensor) -> np.ndarray:
        """Images `(B, size, size, 3)` uint8 of codes `(B, h*w)`, resized as published; waits for the device.

        Of the codes of the first rows alone, if it `decodes_fewer_rows`, images of fewer rows.
        """
        images, (_, width) = [], self.gpt.args.grid
        for part in codes.to(self.device).split(IMAGES_DECODED_AT_ONCE[self.device.type]):
            decoded = self._decode_images(part.view(len(part), -1, width)).float()
            rows, columns = decoded.shape[-2:]
            if columns != self.image_size_eval:
                size = (rows * self.image_size_eval // columns, self.image_size_eval)
                decoded = F.interpolate(decoded, size=size, mode="bicubic")
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
            "gpt_sha256": gpt.sha256,
            "gpt_steps": gpt.steps,
            "tokenizer_sha256": tokenizer.sha256,
        }
        if not rounds_alike(self.gpt):
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
