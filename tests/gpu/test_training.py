"""Training steps: the losses of float32 on the CPU, however they are computed."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from autoregressive.train import train_c2i
from autoregressive.train.config import TrainSettings
from tests.gpu import COMPILED, ON_GPU_ALONE
from tests.tiny_training import assert_same_state
from utils.distributed import World
from utils.engine.parallel import wrap
from utils.engine.state import Trained, capture_state, restore_state, seed_step
from utils.engine.step import make_adamw
from utils.settings import parse

FLAGS = {
    "--gpt-model": "GPT-Tiny",
    "--vocab-size": 256,
    "--num-classes": 10,
    "--image-size": 64,
    "--downsample-size": 8,
    "--global-batch-size": 4,
    "--lr": 1e-3,
}
NO_DROPOUT = {"--dropout-p": 0, "--token-dropout-p": 0, "--class-dropout-p": 0}
STEPS = 4


@dataclass
class Setup:
    chosen: TrainSettings
    trained: Trained
    scaler: torch.amp.GradScaler
    world: World

    def losses(self, side: int, start: int = 0, stop: int = STEPS) -> list[float]:
        """Of the steps from `start` to `stop`, on the same batch each; every step has its own seed, as in training."""
        codes, labels = (part.to(self.world.device) for part in BATCH)
        found = []
        self.trained.module.train()
        for step in range(start, stop):
            seed_step(0, step, 0)
            loss, norm, skipped = train_c2i.train_step(
                self.chosen, self.trained, self.scaler, codes, labels, side, self.world
            )
            found.append(loss.item())
            assert norm.isfinite()
            assert not skipped
        return found


BATCH = (torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 5, 9]))


def setup(device: torch.device, *flags: str, parallel: str | None = None, **changes) -> Setup:
    """A tiny GPT as the trainer builds it; `parallel` wraps it although it is alone."""
    values = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()} | {"--dry-run": None}
    words = [str(word) for pair in values.items() for word in pair if word is not None]
    words += flags if "--compile" in flags else ("--no-compile", *flags)
    chosen, world = parse(TrainSettings, "", words), World(0, 1, 0, device)
    trained = train_c2i.build(chosen, [], world)
    if parallel:
        module = wrap(trained.module, world, parallel, chosen.step.mixed_precision)
        decayed = lambda parameter: parameter.dim() >= 2  # noqa: E731
        trained = Trained(module, make_adamw(module, chosen.step, chosen.rate.lr, decayed), chosen.ema.of(module))
    return Setup(chosen, trained, chosen.step.scaler(world), world)


def no_dropout() -> dict:
    return {name[2:].replace("-", "_"): value for name, value in NO_DROPOUT.items()}


@pytest.fixture(scope="module")
def expected():
    """Losses in float32 on the CPU, by side."""
    cpu = torch.device("cpu")
    return {side: setup(cpu, mixed_precision="none", **no_dropout()).losses(side) for side in (1, 2, 4)}


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize(("precision", "tolerance"), [("none", 5e-3), ("bf16", 5e-2), ("fp16", 3e-2)])
def test_losses_are_those_of_float32_on_the_cpu(device, expected, side, precision, tolerance):
    losses = setup(device, mixed_precision=precision, **no_dropout()).losses(side)
    assert losses == pytest.approx(expected[side], abs=tolerance)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("side", "precision"), [pytest.param(2, "bf16", marks=COMPILED), pytest.param(1, "none", marks=COMPILED)]
)
def test_compiled_layers_give_the_same_losses(device, expected, side, precision):
    losses = setup(device, "--compile", mixed_precision=precision, **no_dropout()).losses(side)
    assert losses == pytest.approx(expected[side], abs=5e-2)


@contextmanager
def group_of_one(device: torch.device, folder):
    """A process group with this process alone, over NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    on_gpu = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1, **on_gpu)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("precision", "compile"), [("none", False), ("bf16", False), pytest.param("bf16", True, marks=COMPILED)]
)
def test_wrapped_models_learn_the_same_and_continue_each_others_state(
    device, expected, parallel, precision, compile, tmp_path
):
    tolerance = 5e-3 if precision == "none" else 5e-2
    compiled, averaged = ["--compile"] if compile else [], {"ema_decay": 0.5, "mixed_precision": precision}
    with group_of_one(device, tmp_path):
        part = setup(device, *compiled, "--ema", parallel=parallel, **averaged, **no_dropout())
        assert part.losses(2, 0, 2) == pytest.approx(expected[2][:2], abs=tolerance)
        state = capture_state([part.trained], part.world)
        assert all(value.device.type == "cpu" for value in state["model"].values())
        assert state["ema"]
        bare = setup(device, "--ema", **averaged, **no_dropout())
        restore_state([bare.trained], state, bare.world)
        assert_same_state(capture_state([bare.trained], bare.world), state)
        assert bare.losses(2, 2) == pytest.approx(expected[2][2:], abs=tolerance)
        assert part.losses(2, 2) == pytest.approx(expected[2][2:], abs=tolerance)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
def test_activation_checkpointing_repeats_dropout(device, compile):
    flags = ["--compile"] if compile else []
    losses = setup(device, *flags, mixed_precision="none").losses(2)
    recomputed = setup(device, *flags, "--activation-checkpointing", mixed_precision="none").losses(2)
    assert recomputed == pytest.approx(losses, abs=5e-3)


def test_micro_batches_change_nothing(device, expected):
    losses = setup(device, mixed_precision="none", gradient_accumulation_steps=2, **no_dropout()).losses(2)
    assert losses == pytest.approx(expected[2], abs=5e-3)


@ON_GPU_ALONE
def test_a_step_waits_for_nothing(device):
    part = setup(device, "--ema", mixed_precision="bf16")
    part.losses(2)
    codes, labels = (tensor.to(device) for tensor in BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            seed_step(0, step, 0)
            train_c2i.train_step(part.chosen, part.trained, part.scaler, codes, labels, 2, part.world)
    finally:
        torch.cuda.set_sync_debug_mode("default")
