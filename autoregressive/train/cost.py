"""What training costs: parameters, floating-point operations, memory; and the table printed before it starts."""

import math

from autoregressive.models.gpt import ModelArgs
from autoregressive.train.schedule import PatchSchedule
from utils.engine.learning_rate import LearningRate

PEAK_FLOPS = {  # dense bf16, from the vendors' data sheets
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by a part of its name; None where we do not know it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def matrix_parameters(args: ModelArgs) -> int:
    """Parameters that multiply every position: all matrices but the embeddings."""
    attention = args.dim * (args.n_head + 2 * args.n_kv_head) * args.head_dim + args.dim**2
    return args.n_layer * (attention + 3 * args.dim * args.ffn_dim) + args.vocab_size * args.dim


def parameters(args: ModelArgs) -> int:
    """All parameters of the model."""
    embeddings = (args.vocab_size + args.num_classes + (args.class_dropout_prob > 0)) * args.dim
    norms = (2 * args.n_layer + 1) * args.dim
    return matrix_parameters(args) + embeddings + norms


def train_flops(args: ModelArgs, side: int) -> int:
    """Operations to train on one image at a patch side: forward and backward (3 times the forward pass).

    Two per parameter and position, plus causal attention's two products of `T*(T+1)/2` pairs (cf. arXiv 2001.08361).
    """
    positions = args.block_size // side**2
    pairs = positions * (positions + 1) // 2
    forward = 2 * matrix_parameters(args) * positions + args.n_layer * 2 * 2 * pairs * args.dim
    return 3 * forward


def schedule_flops(args: ModelArgs, schedule: PatchSchedule, steps: range | None = None) -> int:
    """Operations of `steps` (default: all), for one image per step."""
    return sum(count * train_flops(args, side) for side, count in schedule.steps_by_side(steps).items())


def relative_cost(args: ModelArgs, schedule: PatchSchedule) -> float:
    """Operations of the schedule over those of next-token prediction for as many steps."""
    return schedule_flops(args, schedule) / (schedule.total_steps * train_flops(args, 1))


def memory_bytes(args: ModelArgs, images: int, side: int, shards: int = 1, ema: bool = False, half: bool = True) -> int:
    """Estimated peak training memory of one process for `images` at once; `shards` processes share the state (FSDP).

    State: float32 weights, gradients and two Adam moments. Activations: what one eager layer keeps for backward with
    float32 residuals and (`half`) 16-bit matrix inputs; compiled layers keep less.
    """
    state = parameters(args) * 4 * (4 + ema) // shards
    small = 2 if half else 4
    layer = 20 * args.dim + small * (9 * args.dim + 4 * args.ffn_dim)
    layers = args.n_layer * 4 * args.dim + layer if args.activation_checkpointing else args.n_layer * layer
    return state + images * args.block_size // side**2 * layers


def plan_table(
    args: ModelArgs,
    schedule: PatchSchedule,
    rate: LearningRate,
    batch: int,
    images: int,
    shards: int,
    ema: bool,
    half: bool,
) -> str:
    """The plan as text: a row per stage, then the model and the cost; `images` is one process's micro-batch."""
    total = schedule_flops(args, schedule)
    rows = [["level", "side", "epochs", "steps", "tokens/step", "learning rate", "compute"]]
    for number, steps in enumerate(schedule.stages, 1):
        sides = schedule.steps_by_side(steps)
        tokens = sum(count * batch * args.block_size // side**2 for side, count in sides.items()) // len(steps)
        peak, end = rate.settings.lr, rate.at(steps[-1])
        rows.append(
            [
                str(number),
                ", ".join(f"{side}x{side}" for side in sides),
                f"{steps.start // schedule.steps_per_epoch}-{steps.stop // schedule.steps_per_epoch}",
                f"{len(steps):,}",
                f"{tokens:,}",
                f"{peak:g} -> {end:.3g}" if rate.settings.scheduler else f"{peak:g}",
                f"{schedule_flops(args, schedule, steps) / total:.1%}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    memory = max(memory_bytes(args, images, side, shards, ema, half) for side in schedule.steps_by_side())
    lines.append(
        f"{parameters(args):,} parameters; {total * batch:.4g} FLOPs in all, {relative_cost(args, schedule):.2f}x the "
        f"cost of next-token prediction; about {math.ceil(memory / 2**30)} GiB per process at {images} images each"
    )
    return "\n".join(lines)
