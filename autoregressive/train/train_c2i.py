"""Train a GPT on image codes, coarse to fine: Next Patch Prediction (arXiv 2412.15321).

bash scripts/autoregressive/train_c2i.sh --code-path CODES --image-size 256 --gpt-model GPT-B --scheduler
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from autoregressive.models.conditioning import try_conditioning
from autoregressive.train.compilation import compile_model, compile_sides
from autoregressive.train.config import IMAGENET_IMAGES, TrainSettings
from autoregressive.train.cost import parameters, plan_table
from autoregressive.train.initial import load_initial
from autoregressive.train.monitor import Monitor
from autoregressive.train.schedule import PatchSchedule
from dataset.code_check import refuse_unsound
from dataset.code_dataset import CodeDataset, CodeLoader
from dataset.code_identity import codes_hash
from dataset.code_store import CodeStore, find_stores
from dataset.conditions import conditions_identity, open_conditions
from pretrained_models.catalogue import find_weights
from utils.checkpoint import fingerprint
from utils.commands import absolute_component, command
from utils.distributed import World, init_world
from utils.engine.learning_rate import LearningRate
from utils.engine.parallel import autocast, bare, distribute, sync_gradients
from utils.engine.run import TrainingRun
from utils.engine.state import Trained, seed_step
from utils.engine.step import apply_gradients, make_adamw, set_learning_rate
from utils.memory import require_memory
from utils.program import UserError, first_line, run
from utils.settings import parse


def main() -> None:
    chosen = parse(TrainSettings, "Train a GPT on image codes, coarse to fine (Next Patch Prediction).")
    world = init_world()
    chosen.step.micro_batch(world)  # refuses a batch that does not divide
    stores = open_stores(chosen)
    schedule, rate = chosen.schedules(len(stores[0]) if stores else IMAGENET_IMAGES)
    if world.is_main:
        print_plan(chosen, schedule, rate, world)
    if chosen.dry_run:
        return
    for store in stores:
        refuse_unsound(
            store, chosen.model.vocab_size, None if chosen.data.conditions else chosen.model.num_classes, world
        )
    dataset = open_dataset(chosen, stores)
    refuse_unfit_conditions(chosen, dataset)
    trained = build(chosen, stores, world)
    training = TrainingRun(
        resumed(chosen),
        chosen,
        world,
        model_name=chosen.gpt.gpt_model,
        data=data_identity(chosen, dataset),
        content={"codes": [codes_hash(store) for store in stores]},
        config=model_record(chosen, stores),
        parts=[trained],
        milestones=schedule.stage_ends,
        scaler=chosen.step.scaler(world),
        places=stores[0].places,
    )
    train(chosen, schedule, rate, dataset, trained, training, world)
    checkpoint = training.finish()
    if world.is_main:
        print_next_command(chosen, stores[0], checkpoint, world)
    world.close()


def train(
    chosen: TrainSettings,
    schedule: PatchSchedule,
    rate: LearningRate,
    dataset: CodeDataset,
    trained: Trained,
    training: TrainingRun,
    world: World,
) -> None:
    """The method: at every step the schedule says how many codes one patch averages, and how fast to learn."""
    step_settings = chosen.step
    monitor = Monitor(chosen, schedule, rate, trained, training, world)
    start = training.start()
    if chosen.machine.compile_on(world):
        compile_sides(step_settings, schedule, dataset, trained, training.scaler, world, start)
    seed, batch_size = step_settings.global_seed, step_settings.global_batch_size
    loader = CodeLoader(
        dataset, batch_size, world.rank, world.size, seed, start, world.device, resident=chosen.data.codes_on_device
    )
    monitor.catch_up(start)
    trained.module.train()
    training.metrics.restart_clock()
    for step, (codes, cond) in zip(range(start, schedule.total_steps), training.metrics.timed(loader), strict=False):
        side = schedule.side_at(step)
        seed_step(seed, step, world.rank)
        set_learning_rate(trained.optimizer, rate.at(step))
        loss, grad_norm, found_inf = train_step(chosen, trained, training.scaler, codes, cond, side, world)
        training.metrics.add(**{f"loss_{side}x{side}": loss, "grad_norm": grad_norm})
        training.end_step(step + 1, monitor.row_after(step), found_inf)
        monitor.after_step(step + 1)


def train_step(
    chosen: TrainSettings,
    trained: Trained,
    scaler: torch.amp.GradScaler,
    codes: torch.Tensor,
    cond: torch.Tensor,
    side: int,
    world: World,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update from `codes` `(B, H*W)` and `cond` `(B,)` labels (or what the conditioning takes).

    Returns the loss, the gradient norm, and 1.0 if the update was skipped.
    """
    module, micro_batches = trained.module, chosen.step.gradient_accumulation_steps
    loss = torch.zeros((), device=world.device)
    for number, (c, y) in enumerate(zip(codes.chunk(micro_batches), cond.chunk(micro_batches), strict=True), 1):
        sync_gradients(module, number == micro_batches)
        with autocast(module, world, chosen.step.mixed_precision):
            _, micro_loss = module(c, y, c, side)
        scaler.scale(micro_loss / micro_batches).backward()
        loss += micro_loss.detach() / micro_batches
    return loss, *apply_gradients(trained, scaler, chosen.step.max_grad_norm)


def open_stores(chosen: TrainSettings) -> list[CodeStore]:
    """The code stores, checked against the flags; none with --dry-run alone."""
    data, model = chosen.data, chosen.model
    if data.code_path is None:
        return []
    stores = find_stores(data.code_path, data.dataset, data.image_size, data.code_path_105)
    path, meta, expected = stores[0].path, stores[0].meta, data.grid
    if meta.grid != expected:
        raise UserError(
            f"{path} holds grids of {meta.grid[0]}x{meta.grid[1]} codes, but --image-size {data.image_size} and "
            f"--downsample-size {data.downsample_size} make {expected[0]}x{expected[1]}; use --downsample-size "
            f"{data.image_size // meta.grid[0]}."
        )
    if meta.codebook_size is not None and meta.codebook_size != model.vocab_size:
        raise UserError(
            f"the codes come from a codebook of {meta.codebook_size}, not {model.vocab_size}; use --vocab-size "
            f"{meta.codebook_size}."
        )
    if meta.num_classes is not None and meta.num_classes != model.num_classes:
        raise UserError(
            f"{path} holds {meta.num_classes} classes, not {model.num_classes}; use --num-classes {meta.num_classes}."
        )
    return stores


def open_dataset(chosen: TrainSettings, stores: list[CodeStore]) -> CodeDataset:
    conditions = open_conditions(chosen.data.conditions, len(stores[0])) if chosen.data.conditions else None
    return CodeDataset(stores, seed=chosen.step.global_seed, conditions=conditions)


def refuse_unfit_conditions(chosen: TrainSettings, dataset: CodeDataset) -> None:
    """Raise `UserError` if the user's own conditioning cannot use what there is of each image."""
    if conditioning := chosen.components.get("--conditioning"):
        args = chosen.model_args
        conditions = torch.from_numpy(dataset.conditions_of(np.zeros(2, np.int64)))
        try:
            try_conditioning(conditioning.make(args), conditions, args.cls_token_num, args.dim)
        except ValueError as error:
            given = "check --conditions and --cls-token-num" if chosen.data.conditions else "give it by --conditions"
            raise UserError(f"--conditioning {conditioning.spelling}: {first_line(error)}; {given}.") from error


def build(chosen: TrainSettings, stores: list[CodeStore], world: World) -> Trained:
    """The model on its device, wrapped for the world, its optimizer and average."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(chosen.step.global_seed)
    size = parameters(chosen.model_args)
    learning = 4 if world.device.type == "cpu" else 1  # weights, their gradients and two moments
    require_memory(4 * size * learning, f"a {chosen.gpt.gpt_model} of {size:,} parameters", "choose a smaller model")
    model = chosen.build_model()
    if chosen.gpt.init_from:
        for line in load_initial(model, chosen.gpt, stores[0].meta):
            if world.is_main:
                print(line)
    if chosen.gpt.body_lr_share == 0:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith("cls_embedding."))
    model.to(world.device)
    if chosen.machine.compile_on(world):
        compile_model(model)
    module = distribute(model, world, chosen.machine.parallel, chosen.step.mixed_precision)
    classes = set(bare(module).cls_embedding.parameters())
    optimizer = make_adamw(
        module,
        chosen.step,
        chosen.rate.lr,
        decayed=lambda parameter: parameter.dim() >= 2,
        lr_share=lambda parameter: 1.0 if parameter in classes else chosen.gpt.body_lr_share,
    )
    return Trained(module, optimizer, chosen.ema.of(module))


def resumed(chosen: TrainSettings):
    """The run's settings, with --gpt-ckpt as another spelling of --resume."""
    return replace(chosen.run, resume=chosen.gpt.gpt_ckpt) if chosen.gpt.gpt_ckpt else chosen.run


def data_identity(chosen: TrainSettings, dataset: CodeDataset) -> dict:
    """What is learned from and with, beside the settings: another answer is another run."""
    codes = [
        {
            "images": len(store),
            "crops": store.meta.crops,
            "crop_range": store.meta.crop_range,
            "tokenizer": store.meta.tokenizer,
        }
        for store in dataset.stores
    ]
    found = {"codes": codes} | {flag[2:]: component.identity for flag, component in chosen.components.items()}
    if chosen.gpt.init_from:
        found["init_from"] = f"sha256 {fingerprint(find_weights(chosen.gpt.init_from))}"
    if dataset.conditions is not None:
        found["conditions"] = conditions_identity(dataset.conditions)
    return found


def model_record(chosen: TrainSettings, stores: list[CodeStore]) -> dict:
    """Everything that builds the model again, and what a sampler must know about it."""
    meta, conditioning = stores[0].meta, chosen.components.get("--conditioning")
    return {
        "model": asdict(chosen.model_args),
        "gpt_model": chosen.gpt.gpt_model,
        "image_size": chosen.data.image_size,
        "downsample_size": chosen.data.downsample_size,
        "conditioning": conditioning.identity if conditioning else None,
        "tokenizer": meta.tokenizer,
        "class_names": meta.class_names,
    }


def print_plan(chosen: TrainSettings, schedule: PatchSchedule, rate: LearningRate, world: World) -> None:
    table = plan_table(
        chosen.model_args,
        schedule,
        rate,
        batch=chosen.step.global_batch_size,
        images=chosen.step.micro_batch(world),
        shards=world.size if chosen.machine.parallel == "fsdp" else 1,
        ema=chosen.ema.ema,
        half=chosen.step.mixed_precision != "none",
    )
    print(table, flush=True)


def print_next_command(chosen: TrainSettings, store: CodeStore, checkpoint: Path, world: World) -> None:
    """Sampling, with what the checkpoint does not record: where things lie, and as many images as were trained on."""
    own, tokenizer = chosen.gpt.conditioning, chosen.monitor.vq_ckpt or store.places.get("tokenizer")
    known = tokenizer is not None
    sampling = command(
        "autoregressive/sample_c2i.sh",
        gpt_ckpt=checkpoint,
        vq_ckpt=find_weights(tokenizer) if known else "TOKENIZER.pt",
        vq_model=store.places.get("vq_model"),
        vq_weights=store.meta.tokenizer.get("weights"),
        conditioning=own and absolute_component(own),
        conditions=chosen.data.conditions and Path(chosen.data.conditions),
        image_size_eval=chosen.data.image_size,
        cfg_scale=2.0 if chosen.model.class_dropout_prob else 1.0,
        num_fid_samples=min(len(store), 50_000 if world.device.type == "cuda" else 1_000),
        sample_dir=Path(chosen.run.results_dir).absolute().with_name("samples"),
    )
    print(f"trained: {checkpoint}\nnext: {sampling}{'' if known else '   # TOKENIZER.pt: that of the codes'}")


if __name__ == "__main__":
    run(main)
