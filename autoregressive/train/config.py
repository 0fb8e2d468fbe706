"""The settings of the GPT trainer: published names and defaults, and a few of its own. The command line follows."""

from autoregressive.models.gpt import GPT_SIZES, ModelArgs, Transformer, model_args
from autoregressive.train.schedule import PatchSchedule, PatchScheduleSettings, coarse_to_fine, own_schedule
from utils.component import Component, load_component
from utils.distributed import World
from utils.engine.learning_rate import LearningRate, LearningRateSettings
from utils.engine.run import RunSettings
from utils.engine.state import EMASettings
from utils.engine.step import StepSettings
from utils.program import UserError, first_line
from utils.settings import default_identity, identity, option, recipe, settings

IMAGENET_IMAGES = 1_281_167  # for --dry-run without codes


@settings("GPT")
class GPTChoice:
    gpt_model: str = recipe("GPT-B", "size of the transformer", choices=GPT_SIZES)
    gpt_ckpt: str | None = option(None, "training checkpoint to continue from (the same as --resume PATH)")
    init_from: str | None = recipe(
        None,
        "start from these weights alone: a published file or any checkpoint, of any number of classes and any grid "
        "(docs/fine-tuning.md)",
    )
    init_classes: str | None = recipe(
        None,
        "classes of --init-from, as labels or names separated by commas, from which ours start in label order: one for "
        "all or one each; null is its null class (default: the same classes, or null if there are more or fewer)",
    )
    body_lr_share: float = recipe(
        1.0, "share of the learning rate for all weights but the embeddings of the classes; 0 freezes them", at_least=0
    )
    loss: str | None = recipe(
        None, "a loss of your own, as FILE.py:NAME, in place of the patch loss (docs/extending.md)"
    )
    conditioning: str | None = recipe(
        None, "what stands before the image, as FILE.py:NAME, in place of the class label (docs/extending.md)"
    )


@settings("data")
class DataSettings:
    code_path: str | None = option(None, "folder given to extract_codes_c2i.sh")
    code_path_105: str | None = option(
        None,
        "folder of the same images at crop range 1.05, mixed in half and half (default: --code-path with ten_crop "
        "replaced by ten_crop_105, if that exists)",
    )
    dataset: str = recipe("imagenet_code", "name given at extraction; _code at its end is cut")
    image_size: int = recipe(256, "pixels per side, as at extraction", at_least=1)
    downsample_size: int = recipe(16, "pixels per side of one code", at_least=1)
    conditions: str | None = option(
        None,
        "array of what --conditioning takes (.npy), one row per image in the order of the codes, in place of labels",
    )
    num_workers: int = option(
        24,
        "accepted for published commands; codes come from a memory map, for which one thread per process is enough",
        at_least=0,
    )
    codes_on_device: bool = option(False, "keep all codes in device memory (ImageNet: 6.6 GB)")

    @property
    def grid(self) -> tuple[int, int]:
        if self.image_size % self.downsample_size:
            raise UserError(
                f"--image-size {self.image_size} is not a multiple of --downsample-size {self.downsample_size}."
            )
        return (self.image_size // self.downsample_size,) * 2


@settings("machine")
class MachineSettings:
    parallel: str = option("ddp", "replicas, or weights sharded over all processes", choices=("ddp", "fsdp"))
    compile: bool | None = option(None, "compile each layer (default: on GPUs only)")

    def compile_on(self, world: World) -> bool:
        return world.device.type == "cuda" if self.compile is None else self.compile


@settings("validation and samples while training")
class MonitorSettings:
    val_code_path: str | None = option(None, "folder of held-out codes, extracted with the same --dataset and size")
    val_conditions: str | None = option(None, "the array of --conditions for held-out images")
    val_every: int = option(5000, "steps between validation losses", at_least=1)
    vq_ckpt: str | None = option(None, "checkpoint of the tokenizer: draw a sample grid now and then")
    vq_model: str | None = option(None, "name of the tokenizer (default: what the codes were made with)")
    codebook_embed_dim: int | None = option(
        None, "dimension of the codebook's vectors (default: as the tokenizer's checkpoint records, else 8)", at_least=1
    )
    sample_every: int = option(5000, "steps between sample grids", at_least=1)
    sample_cfg_scale: float = option(2.0, "scale of classifier-free guidance for the grids", at_least=1)


@settings("training")
class TrainSettings:
    gpt: GPTChoice
    model: ModelArgs
    data: DataSettings
    patches: PatchScheduleSettings
    rate: LearningRateSettings
    step: StepSettings
    ema: EMASettings
    machine: MachineSettings
    monitor: MonitorSettings
    run: RunSettings
    dry_run: bool = option(
        False, "print the plan and its cost, and stop (without --code-path: for as many images as ImageNet has)"
    )

    def __post_init__(self):
        if self.data.code_path is None and not self.dry_run:
            raise UserError("the following arguments are required: --code-path")
        if self.gpt.gpt_ckpt is not None and self.run.resume != "auto":
            raise UserError("--gpt-ckpt and --resume mean the same; give one of them.")
        if self.gpt.init_classes is not None and self.gpt.init_from is None:
            raise UserError("--init-classes names classes of the weights that --init-from gives; give both.")
        if self.gpt.body_lr_share == 0 and self.gpt.init_from is None:
            raise UserError("--body-lr-share 0 keeps the body as it is, which needs trained weights: give --init-from.")
        if self.data.conditions is not None and self.gpt.conditioning is None:
            raise UserError("--conditions are for a --conditioning that takes them; give it, or leave them out.")
        if self.monitor.val_conditions is not None and self.monitor.val_code_path is None:
            raise UserError("--val-conditions are those of the images of --val-code-path; give both, or neither.")
        if self.monitor.val_code_path and (self.data.conditions is None) != (self.monitor.val_conditions is None):
            raise UserError(
                "--conditions and --val-conditions belong together where there is a --val-code-path; give both."
            )
        if self.gpt.conditioning is None and self.model.cls_token_num != 1:
            raise UserError("a class label stands at one position; --cls-token-num above 1 needs a --conditioning.")
        if self.machine.parallel == "fsdp" and self.step.mixed_precision == "fp16":
            raise UserError("--parallel fsdp has no loss scaling for fp16; use --mixed-precision bf16.")

    @property
    def model_args(self) -> ModelArgs:
        """The model that will be trained."""
        grid = self.data.grid
        return model_args(self.gpt.gpt_model, self.model, grid=grid, block_size=grid[0] * grid[1])

    def build_model(self) -> Transformer:
        """The model with new weights."""
        conditioning, loss = self.components.get("--conditioning"), self.components.get("--loss")
        parts = {"conditioning": conditioning.make} if conditioning else {}
        return Transformer(self.model_args, **parts | ({"loss": loss.make} if loss else {}))

    @property
    def components(self) -> dict[str, Component]:
        """The user's own parts, by flag."""
        named = {
            "--loss": (self.gpt.loss, ("hidden", "weight", "targets")),
            "--conditioning": (self.gpt.conditioning, ("args",)),
            "--patch-schedule": (self.patches.patch_schedule, ("step", "steps")),
        }
        return {flag: load_component(text, flag, given) for flag, (text, given) in named.items() if text is not None}

    def schedules(self, images: int) -> tuple[PatchSchedule, LearningRate]:
        """Patch sides and learning rates over all steps. Raises `UserError` for those that cannot be."""
        patches, steps_per_epoch = self.patches, images // self.step.global_batch_size
        try:
            if own := self.components.get("--patch-schedule"):
                _refuse_level_flags(patches)
                schedule = own_schedule(own.make, patches.epochs, steps_per_epoch, self.data.grid)
            else:
                schedule = coarse_to_fine(
                    patches.epochs, steps_per_epoch, patches.patch_level, patches.epoch_rate, self.data.grid
                )
            return schedule, LearningRate(self.rate, [len(stage) for stage in schedule.stages], steps_per_epoch)
        except ValueError as error:
            raise UserError(f"{first_line(error)}.") from error


def _refuse_level_flags(patches: PatchScheduleSettings) -> None:
    usual, given = default_identity(PatchScheduleSettings), identity(patches)
    if any(given[name] != usual[name] for name in ("patch_level", "epoch_rate")):
        raise UserError("--patch-schedule decides the patch sides; leave out --patch-level and --epoch-rate.")
