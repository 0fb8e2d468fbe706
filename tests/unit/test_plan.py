"""Levels and learning rates against golden figures, at every boundary, and the refusals."""

import json

import pytest

from autoregressive.train.schedule import make_plan
from tests.golden_gpt import GOLDEN

GOLDEN_PLANS = json.loads((GOLDEN / "schedule.json").read_text())
PUBLISHED = dict(
    epochs=300, steps_per_epoch=5004, patch_level=2, epoch_rate=0.5, grid=(16, 16),
    lr=1e-4, end_lr=1e-5, warmup_epochs=1, decay_ratio=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    "golden", GOLDEN_PLANS, ids=lambda g: f"{g['epochs']}x{g['steps_per_epoch']}-L{g['patch_level']}"
)
def test_golden_plans(golden):
    names = ["epochs", "steps_per_epoch", "patch_level", "epoch_rate", "lr", "end_lr", "warmup_epochs", "decay_ratio"]
    plan = make_plan(**{name: golden[name] for name in names}, grid=(16, 16))
    assert [level.first_epoch + level.epochs for level in plan.levels] == golden["level_end_epochs"]
    sides = [plan.level_at(epoch * plan.steps_per_epoch).side for epoch in range(golden["epochs"])]
    assert [side**2 for side in sides] == golden["patch_size_by_epoch"]
    assert plan.total_steps == len(golden["lr_by_step"])
    assert [plan.lr_at(step) for step in range(plan.total_steps)] == pytest.approx(golden["lr_by_step"], abs=1e-9)


def test_boundaries_of_the_published_plan():
    plan = make_plan(**PUBLISHED)
    switch = 150 * 5004
    assert [level.side for level in plan.levels] == [2, 1]
    assert plan.level_at(switch - 1).side == 2
    assert plan.level_at(switch).side == 1
    assert plan.lr_at(0) == plan.lr_at(switch) == 0
    assert plan.lr_at(5004) == plan.lr_at(switch + 5004) == 1e-4
    assert plan.lr_at(120 * 5004) == pytest.approx(1e-4)
    assert plan.lr_at(switch - 1) == pytest.approx(1e-5, rel=1e-3)
    assert plan.lr_at(plan.total_steps - 1) == pytest.approx(1e-5, rel=1e-3)
    assert plan.lr_at(plan.total_steps + 7) == pytest.approx(1e-5)
    assert all(plan.lr_at(step) > 0 for step in range(1, plan.total_steps, 997) if step != switch)


def test_without_scheduler_the_learning_rate_is_constant():
    plan = make_plan(**PUBLISHED | dict(scheduler=False, warmup_epochs=500))
    assert {plan.lr_at(step) for step in (0, 1, 10**6)} == {1e-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=1), "level 1 of 2 .2x2 patches. would get no epoch"),
        (dict(epochs=0), "--epochs must be at least 1"),
        (dict(steps_per_epoch=0), "a batch must fit the data"),
        (dict(patch_level=0), "--patch-level must be at least 1"),
        (dict(patch_level=-3), "--patch-level must be at least 1"),
        (dict(epoch_rate=1.0), "--epoch-rate must lie between 0 and 1"),
        (dict(epoch_rate=0.0), "--epoch-rate must lie between 0 and 1"),
        (dict(patch_level=4, grid=(28, 28)), "8x8 patches, which do not tile the grid of 28x28 .* --patch-level 3"),
        (dict(patch_level=2, grid=(16, 15)), "2x2 patches, which do not tile the grid of 16x15 .* --patch-level 1"),
        (dict(warmup_epochs=121), "less than --warmup-epochs 121 plus --decay-ratio 0.2"),
        (dict(warmup_epochs=-1), "--warmup-epochs must not be negative"),
        (dict(decay_ratio=1.5), "--decay-ratio must lie in"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**PUBLISHED | change)
