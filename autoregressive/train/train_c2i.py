"""Train a GPT on image codes, coarse to fine: Next Patch Prediction (arXiv 2412.15321).

bash scripts/autoregressive/train_c2i.sh --code-path CODES --image-size 256 --gpt-model GPT-B --scheduler
"""

from dataclasses import asdict

import torch

from autoregressive.models.gpt import ModelArgs, Transformer, model_args
from autoregressive.train.compilation import compile_levels, compile_model
from autoregressive.train.config import parse_args
from autoregressive.train.cost import plan_table
from autoregressive.train.monitor import Watch
from autoregressive.train.schedule import Plan, make_plan
from dataset.code_dataset import CodeDataset, CodeLoader
from dataset.code_store import CodeStore, find_stores
from pretrained_models.catalogue import load_initial
from utils.distributed import World, init_world
from utils.engine.parallel import autocast, distribute, sync_gradients
from utils.engine.run import TrainingRun
from utils.engine.state import EMA, Trained, seed_step
from utils.engine.step import apply_gradients, check_batch_size
from utils.program import UserError, run

IMAGENET_IMAGES = 1_281_167  # for --dry-run without codes


def main() -> None:
    args = parse_args()
    world = init_world()
    gpt_args = _model_args(args)
    stores = _open_stores(args)
    plan = _plan(args, gpt_args, stores)
    _check_batch(args, world)
    if world.is_main:
        images = args.global_batch_size // world.size // args.gradient_accumulation_steps
        shards = world.size if args.parallel == "fsdp" else 1
        half = args.mixed_precision != "none"
        print(plan_table(gpt_args, plan, args.global_batch_size, images, shards, args.ema, half), flush=True)
    if args.dry_run:
        return
    trained = _build(args, gpt_args, world)
    training = TrainingRun(
        args, world, args.gpt_model, _recipe(args, stores), _config(args, gpt_args, stores), [trained],
        milestones=[level.first_step + level.steps for level in plan.levels],
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16"),
    )  # fmt: skip
    train(args, plan, gpt_args, trained, training, stores, world)
    checkpoint = training.finish()
    if world.is_main:
        _print_next_command(args, checkpoint)
    world.close()


def train(args, plan: Plan, gpt_args: ModelArgs, trained: Trained, training: TrainingRun, stores, world: World) -> None:
    """The method: at every step the plan says how many codes one patch averages, and how fast to learn."""
    start = training.start()
    scaler = training.scaler
    if args.compile:
        compile_levels(args, plan, gpt_args, trained, scaler, world, start)
    loader = CodeLoader(
        CodeDataset(stores, seed=args.global_seed), args.global_batch_size, world.rank, world.size, args.global_seed,
        start, world.device, resident=args.codes_on_device,
    )  # fmt: skip
    watch = Watch(args, plan, gpt_args, trained, training, world)
    trained.module.train()
    training.metrics.restart_clock()
    for step, (codes, labels) in zip(range(start, plan.total_steps), training.metrics.timed(loader), strict=False):
        side = plan.level_at(step).side
        seed_step(args.global_seed, step, world.rank)
        for group in trained.optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
        loss, grad_norm, found_inf = train_step(args, trained, scaler, codes, labels, side, world)
        training.metrics.add(**{f"loss_{side}x{side}": loss, "grad_norm": grad_norm})
        training.end_step(step + 1, watch.row_after(step), found_inf)
        watch.after_step(step)


def train_step(args, trained: Trained, scaler, codes, labels, side: int, world: World):
    """One update from `codes` `(B, H*W)` and `labels` `(B,)`; returns loss, gradient norm, and 1.0 if skipped."""
    module = trained.module
    micro_batches = args.gradient_accumulation_steps
    loss = torch.zeros((), device=world.device)
    for number, (c, y) in enumerate(zip(codes.chunk(micro_batches), labels.chunk(micro_batches), strict=True), 1):
        sync_gradients(module, number == micro_batches)
        with autocast(module, world, args.mixed_precision):
            _, micro_loss = module(c, y, c, side)
        scaler.scale(micro_loss / micro_batches).backward()
        loss += micro_loss.detach() / micro_batches
    return loss, *apply_gradients(trained, scaler, args.max_grad_norm)


def _open_stores(args) -> list[CodeStore]:
    if args.code_path is None:
        return []
    stores = find_stores(args.code_path, args.dataset, args.image_size, args.code_path_105)
    meta = stores[0].meta
    expected = (args.image_size // args.downsample_size,) * 2
    if meta.grid != expected:
        raise UserError(f"{stores[0].path} holds grids of {meta.grid[0]}x{meta.grid[1]} codes, but --image-size "
                        f"{args.image_size} and --downsample-size {args.downsample_size} make {expected[0]}x"
                        f"{expected[1]}; use --downsample-size {args.image_size // meta.grid[0]}.")  # fmt: skip
    if meta.codebook_size is not None and meta.codebook_size != args.vocab_size:
        raise UserError(f"the codes come from a codebook of {meta.codebook_size}, not {args.vocab_size}; "
                        f"use --vocab-size {meta.codebook_size}.")  # fmt: skip
    classes = meta.num_classes if meta.num_classes is not None else int(stores[0].labels.max()) + 1
    if classes != args.num_classes and (meta.num_classes is not None or classes > args.num_classes):
        raise UserError(f"{stores[0].path} holds {classes} classes, not {args.num_classes}; "
                        f"use --num-classes {classes}.")  # fmt: skip
    return stores


def _model_args(args) -> ModelArgs:
    if args.image_size % args.downsample_size:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of --downsample-size {args.downsample_size}."
        )
    side = args.image_size // args.downsample_size
    return model_args(
        args.gpt_model, vocab_size=args.vocab_size, block_size=side**2,
        num_classes=args.num_classes, class_dropout_prob=args.class_dropout_p, token_dropout_p=args.token_dropout_p,
        resid_dropout_p=args.dropout_p, ffn_dropout_p=args.dropout_p, drop_path_rate=args.drop_path_rate,
        activation_checkpointing=args.activation_checkpointing,
    )  # fmt: skip


def _plan(args, gpt_args: ModelArgs, stores: list[CodeStore]) -> Plan:
    images = len(stores[0]) if stores else IMAGENET_IMAGES
    try:
        return make_plan(
            args.epochs, images // args.global_batch_size, args.patch_level, args.epoch_rate, gpt_args.grid,
            args.lr, args.end_lr, args.warmup_epochs, args.decay_ratio, args.scheduler,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}.") from error


def _check_batch(args, world: World) -> None:
    check_batch_size(args, world)
    if args.parallel == "fsdp" and args.mixed_precision == "fp16":
        raise UserError("--parallel fsdp has no loss scaling for fp16; use --mixed-precision bf16.")


def _build(args, gpt_args: ModelArgs, world: World) -> Trained:
    """The model on its device, wrapped for the world, its optimizer and average."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.global_seed)
    model = Transformer(gpt_args)
    if args.init_from:
        kind = load_initial(model, args.init_from, "check --gpt-model, --vocab-size and --num-classes.")
        if world.is_main:
            print(f"starting from the {kind} weights of {args.init_from}")
    model.to(world.device)
    if args.compile is None:
        args.compile = world.device.type == "cuda"
    if args.compile:
        compile_model(model)
    module = distribute(model, world, args.parallel, args.mixed_precision)
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    return Trained(module, optimizer, EMA(module, args.ema_decay) if args.ema else None)


def _recipe(args, stores: list[CodeStore]) -> dict:
    """Every setting that changes what is learned (the number of processes and how they share work do not)."""
    names = """gpt_model init_from vocab_size dropout_p token_dropout_p drop_path_rate class_dropout_p ema ema_decay
        dataset image_size downsample_size num_classes epochs patch_level epoch_rate global_batch_size lr scheduler
        warmup_epochs decay_ratio end_lr weight_decay beta1 beta2 max_grad_norm mixed_precision global_seed"""
    codes = [{"images": len(store), "crops": store.meta.crops, "crop_range": store.meta.crop_range,
              "tokenizer": store.meta.tokenizer} for store in stores]  # fmt: skip
    return {name: getattr(args, name) for name in names.split()} | {"codes": codes}


def _config(args, gpt_args: ModelArgs, stores: list[CodeStore]) -> dict:
    """What a sampler must know about the weights; checked against its flags."""
    meta = stores[0].meta
    trained_as = {name: value for name, value in asdict(gpt_args).items() if name != "activation_checkpointing"}
    return trained_as | {
        "gpt_model": args.gpt_model, "image_size": args.image_size, "downsample_size": args.downsample_size,
        "grid": list(gpt_args.grid), "tokenizer": meta.tokenizer, "class_names": meta.class_names,
    }  # fmt: skip


def _print_next_command(args, checkpoint) -> None:
    print(f"trained: {checkpoint}\nnext: bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt {checkpoint} "
          f"--gpt-model {args.gpt_model} --image-size {args.image_size} --image-size-eval {args.image_size} "
          f"--num-classes {args.num_classes} --cfg-scale 2.0 --vq-ckpt TOKENIZER.pt")  # fmt: skip


if __name__ == "__main__":
    run(main)
