"""Parameters and operations counted by formula against the real modules, and the published recipes' cost."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.models.gpt import GPT_SIZES, ModelArgs
from autoregressive.train.cost import parameters, peak_flops, plan_table, relative_cost, schedule_flops, train_flops
from autoregressive.train.schedule import coarse_to_fine
from tests.golden_gpt import GOLDEN, golden_args, golden_model
from utils.engine.learning_rate import LearningRate, LearningRateSettings

PUBLISHED = dict(epochs=300, steps_per_epoch=5004, epoch_rate=0.5, grid=(16, 16))


def sized(name: str) -> ModelArgs:
    n_layer, n_head, dim = GPT_SIZES[name]
    return ModelArgs(n_layer=n_layer, n_head=n_head, dim=dim)


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "gpt_manifest.json").read_text())))
def test_parameter_counts(name):
    assert parameters(sized(name)) == json.loads((GOLDEN / "gpt_manifest.json").read_text())[name]["params"]


@pytest.mark.parametrize("side", [1, 2])
def test_operations_are_those_of_the_modules(side):
    args, model = golden_args(), golden_model().eval()
    codes, labels = torch.zeros(1, 64, dtype=torch.long), torch.tensor([0])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(codes, labels, patch_side=side)
    positions = 64 // side**2
    full_square = args.n_layer * 4 * positions**2 * args.dim  # the counter does not know that the mask is causal
    causal = args.n_layer * 4 * (positions * (positions + 1) // 2) * args.dim
    assert train_flops(args, side) == 3 * (counter.get_total_flops() - full_square + causal)


@pytest.mark.parametrize("name", ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL"])
def test_published_recipes_cost_0_62_of_next_token_prediction(name):
    schedule = coarse_to_fine(patch_level=2, **PUBLISHED)
    rate = LearningRate(LearningRateSettings(scheduler=True), [750_600, 750_600], 5004)
    assert relative_cost(sized(name), schedule) == pytest.approx(0.62, abs=0.006)
    table = plan_table(sized(name), schedule, rate, batch=256, images=32, shards=1, ema=False, half=True)
    assert "0.62x the cost of next-token prediction" in table
    assert "750,600" in table  # steps of each level
    assert "16,384" in table  # tokens per coarse step
    assert relative_cost(sized(name), coarse_to_fine(patch_level=1, **PUBLISHED)) == 1


def test_operations_up_to_a_step_count_the_side_of_every_step():
    schedule = coarse_to_fine(epochs=4, steps_per_epoch=2, patch_level=2, epoch_rate=0.5, grid=(16, 16))
    coarse, fine = (train_flops(sized("GPT-B"), side) for side in (2, 1))
    assert schedule_flops(sized("GPT-B"), schedule) == 4 * coarse + 4 * fine
    assert schedule_flops(sized("GPT-B"), schedule, range(3, 6)) == coarse + 2 * fine


def test_known_devices():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("some laptop") is None
