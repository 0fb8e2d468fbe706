"""What the tokenizer's trainer starts from: its settings, models and optimizers, and what a run records."""

import dataclasses
import hashlib
import os

import torch
from torch import nn

from dataset.image_folder import ImageFolder
from pretrained_models.catalogue import find_weights, load_initial
from tokenizer.base import TrainableTokenizer
from tokenizer.tokenizer_image import lpips
from tokenizer.tokenizer_image.load import DEFAULT_TOKENIZER, check_image_size, check_sizes, given_sizes, new_tokenizer
from tokenizer.tokenizer_image.lpips import LPIPSSettings, load_lpips
from tokenizer.tokenizer_image.metrics import SSIM_WINDOW
from tokenizer.tokenizer_image.vq_loss import LossSettings, PatchDiscriminator, VQLoss
from tokenizer.tokenizer_image.vq_model import VectorQuantizer, VQ_models, VQModel
from utils.checkpoint import fingerprint
from utils.distributed import World
from utils.engine.learning_rate import LearningRate, LearningRateSettings, check_length
from utils.engine.parallel import bare, distribute
from utils.engine.run import RunSettings
from utils.engine.state import EMASettings, Trained
from utils.engine.step import StepSettings, make_adamw
from utils.memory import require_memory
from utils.program import UserError
from utils.settings import REQUIRED, SettingError, option, recipe, settings, with_defaults

MOST_PIXELS = 16_384  # per side: one crop of 0.8 GB


@settings("model")
class VQModelSettings:
    vq_model: str = recipe(
        DEFAULT_TOKENIZER,
        f"architecture: {', '.join(VQ_models)} (the number is the pixels per side that one code covers; VQ-Tiny: 4), "
        "or a class of your own as FILE.py:NAME or 'FILE.py:NAME(key=value)'",
    )
    codebook_size: int | None = recipe(None, "number of codes; default: 16384, or what your own class says", at_least=1)
    codebook_embed_dim: int | None = recipe(
        None, "length of a code's vector; default: 8, or what your own class says", at_least=1
    )
    commit_loss_beta: float = recipe(0.25, "weight of the commitment loss", at_least=0)
    entropy_loss_ratio: float = recipe(0.0, "weight of the entropy loss; 0: not computed", at_least=0)
    dropout_p: float = recipe(0.0, "dropout inside the residual blocks", at_least=0, below=1)
    revive_dead_codes: int = recipe(
        0, "steps after which unused codes move onto vectors of the batch; 0: never", at_least=0
    )
    vq_ckpt: str | None = option(None, "training checkpoint to continue from, the same as --resume; or see --finetune")
    finetune: bool = option(False, "take only the weights of --vq-ckpt, the same as --init-from")
    init_from: str | None = recipe(
        None,
        "start from these weights alone: a published file or any checkpoint (its averaged weights, where it has them)",
        aliases=("--finetune-from",),
    )

    def __post_init__(self):
        if self.finetune and not self.vq_ckpt:
            raise SettingError("finetune", "--finetune", "needs --vq-ckpt, the weights to start from")
        if self.init_from and self.vq_ckpt:
            raise SettingError("init_from", "--init-from", "and --vq-ckpt both say where to start; give one of them")

    @property
    def initial_weights(self) -> str | None:
        return self.vq_ckpt if self.finetune else self.init_from


@settings("data")
class VQDataSettings:
    data_path: str = option(REQUIRED, "image folder: one folder per class")
    dataset: str = option("imagenet", "accepted as published: any folder of classes", choices=("imagenet",))
    val_data_path: str | None = option(None, "image folder of held-out images: PSNR and SSIM while training")
    val_every: int = option(5000, "steps between validations", at_least=1)
    image_size: int = recipe(256, "pixels per side of the random crops", at_least=1, at_most=MOST_PIXELS)
    mirror: bool = recipe(True, "mirror half of the crops; not for digits or text")
    num_workers: int = option(16, "decoding processes per rank, at most its share of the cores; 0: none", at_least=0)


@settings("training")
class VQTrainSettings:
    """Published names and defaults; the published recipe's weight decay of 0.05 was never applied, so it is 0 here."""

    model: VQModelSettings
    data: VQDataSettings
    loss: LossSettings
    lpips: LPIPSSettings
    step: with_defaults(StepSettings, global_batch_size=128, weight_decay=0.0)
    learning_rate: LearningRateSettings
    ema: EMASettings
    run: with_defaults(RunSettings, results_dir="results_tokenizer_image", ckpt_every=5000)
    epochs: int = recipe(40, "passes over the images", at_least=1)
    compile: bool | None = option(None, "compile the tokenizer, the discriminator and LPIPS; default: on GPUs only")

    def __post_init__(self):
        if self.model.vq_ckpt and self.run.resume != "auto":
            raise SettingError("vq_ckpt", "--vq-ckpt", "and --resume both say where to start; give one of them")
        size = self.data.image_size
        for used, pixels, who, remedy in (
            (self.loss.disc_weight > 0, self.loss.smallest_image, "the discriminator judges", "--disc-weight 0"),
            (self.loss.perceptual_weight > 0, lpips.SMALLEST_IMAGE, "LPIPS compares", "--perceptual-weight 0"),
            (self.data.val_data_path, SSIM_WINDOW, "SSIM compares", "no --val-data-path"),
        ):
            if used and size < pixels:
                reason = f"{size} is too small: {who} images of at least {pixels} pixels per side; use {remedy}"
                raise SettingError("image_size", "--image-size", reason)

    @property
    def continued_run(self) -> RunSettings:
        """`run`, and what the published `--vq-ckpt` means for it."""
        continues = self.model.vq_ckpt and not self.model.finetune
        return dataclasses.replace(self.run, resume=self.model.vq_ckpt) if continues else self.run

    def schedule(self, folder: ImageFolder) -> LearningRate:
        """The learning rate of a training that is one stage."""
        steps_per_epoch = len(folder) // self.step.global_batch_size
        if steps_per_epoch < 1:
            raise UserError(
                f"--global-batch-size {self.step.global_batch_size} is more than the {len(folder):,} images of "
                f"{self.data.data_path}; a batch must fit the data."
            )
        try:
            check_length(self.epochs, steps_per_epoch)
            return LearningRate(self.learning_rate, [self.epochs * steps_per_epoch], steps_per_epoch)
        except ValueError as error:
            raise UserError(f"{error}.") from error


def should_compile(settings: VQTrainSettings, world: World) -> bool:
    return world.device.type == "cuda" if settings.compile is None else settings.compile


def make_tokenizer(settings: VQTrainSettings, world: World) -> tuple[Trained, str]:
    """The tokenizer with its optimizer, and its identity: the name, or what identifies a user's class."""
    chosen = settings.model
    numbers = (chosen.codebook_size or 1) * (chosen.codebook_embed_dim or 1)
    require_memory(16 * numbers, f"training a codebook of {numbers:,} numbers", "lower --codebook-size")
    torch.manual_seed(settings.step.global_seed)
    model, identity = new_tokenizer(
        chosen.vq_model,
        **given_sizes(chosen),
        commit_loss_beta=chosen.commit_loss_beta,
        entropy_loss_ratio=chosen.entropy_loss_ratio,
        dropout_p=chosen.dropout_p,
    )
    if not isinstance(model, TrainableTokenizer):
        raise UserError(f"--vq-model {chosen.vq_model} cannot be trained; tokenizer/base.py says what that takes.")
    check_sizes(chosen, model, identity)
    check_image_size(settings.data.image_size, identity, model.downsample_factor)
    if chosen.initial_weights:
        remedy = "check --vq-model, --codebook-size and --codebook-embed-dim."
        kind = load_initial(model, chosen.initial_weights, remedy)
        if world.is_main:
            print(f"starting from the {kind} weights of {chosen.initial_weights}")
    if isinstance(getattr(model, "quantize", None), VectorQuantizer):  # its codes are vectors that learn, and can die
        model.quantize.codebook_used.zero_()
    elif chosen.revive_dead_codes:
        raise UserError(f"{identity} has no learned codebook; leave --revive-dead-codes out.")
    model.to(world.device, memory_format=torch.channels_last)
    if should_compile(settings, world):
        model.compile_layers()
    module = distribute(model, world, "ddp", settings.step.mixed_precision)
    return Trained(module, _adamw(settings, module), settings.ema.of(module)), identity


def make_discriminator(settings: VQTrainSettings, total_steps: int, world: World) -> Trained | None:
    loss = settings.loss
    if loss.disc_weight == 0:
        return None
    if loss.disc_start >= total_steps:
        if world.is_main:
            print(f"no adversarial loss: --disc-start {loss.disc_start:,} lies beyond the {total_steps:,} steps")
        return None
    torch.manual_seed(settings.step.global_seed + 1)
    model = PatchDiscriminator(loss.disc_dim, loss.disc_num_layers)
    model.to(world.device, memory_format=torch.channels_last)
    if should_compile(settings, world):
        model.compile(dynamic=False)
    module = distribute(model, world, "ddp", settings.step.mixed_precision)
    optimizer = _adamw(settings, module)
    # A checkpoint taken before its start must restore what a run without that checkpoint has: nothing learned yet.
    for parameter in module.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=world.device), **zeros}
    return Trained(module, optimizer, names=("discriminator", "optimizer_disc", "ema_disc"))


def make_loss(settings: VQTrainSettings, world: World) -> VQLoss:
    perceptual = None
    if settings.loss.perceptual_weight > 0:
        perceptual = load_lpips(settings.lpips, world).to(memory_format=torch.channels_last)
        if should_compile(settings, world):
            perceptual.compile(dynamic=False)
    return VQLoss(settings.loss, perceptual, world)


def _adamw(settings: VQTrainSettings, module: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on convolutions alone: not on norms, biases and the codebook."""
    return make_adamw(module, settings.step, settings.learning_rate.lr, decayed=lambda parameter: parameter.dim() == 4)


def data_of(settings: VQTrainSettings, tokenizer: Trained, identity: str, folder: ImageFolder) -> dict:
    """What the settings leave open and changes the result: it identifies the run together with them."""
    resolved = {"vq_model": identity, "init_from": settings.model.initial_weights, "images": len(folder)}
    return resolved | sizes_of(bare(tokenizer.module))


def content_of(settings: VQTrainSettings, folder: ImageFolder) -> dict:
    """What tells image folders of the same size apart, a hash of the images' paths below the folder; and the weights
    that a file of the same name holds.
    """
    paths = hashlib.sha256()
    for path in folder.paths:
        paths.update(os.fsencode(path) + b"\0")
    weights = settings.model.initial_weights
    initial = {"init_from": f"sha256 {fingerprint(find_weights(weights))}"} if weights else {}
    return {"image list": paths.hexdigest()[:16]} | initial


def config_of(settings: VQTrainSettings, tokenizer: Trained, identity: str) -> dict:
    """Everything that builds this tokenizer again."""
    model = bare(tokenizer.module)
    config = dataclasses.asdict(model.config) if isinstance(model, VQModel) else {}
    names = {"vq_model": settings.model.vq_model, "vq_model_identity": identity}
    return config | sizes_of(model) | names | {"image_size": settings.data.image_size}


def sizes_of(model: TrainableTokenizer) -> dict:
    return {"codebook_size": model.codebook_size, "codebook_embed_dim": getattr(model, "codebook_embed_dim", None)}
