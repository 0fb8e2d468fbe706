"""Levels and learning rates against golden figures, at every boundary, and the refusals."""

import json

import pytest

from autoregressive.train.schedule import coarse_to_fine, own_schedule
from tests.golden_gpt import GOLDEN
from utils.engine.learning_rate import LearningRate, LearningRateSettings

GOLDEN_PLANS = json.loads((GOLDEN / "schedule.json").read_text())
PUBLISHED = dict(epochs=300, steps_per_epoch=5004, patch_level=2, epoch_rate=0.5, grid=(16, 16))
RATES = dict(lr=1e-4, end_lr=1e-5, warmup_epochs=1, decay_ratio=0.2, scheduler=True)


def published(rates=RATES, **changes):
    schedule = coarse_to_fine(**PUBLISHED | changes)
    steps = [len(stage) for stage in schedule.stages]
    return schedule, LearningRate(LearningRateSettings(**rates), steps, schedule.steps_per_epoch)


@pytest.mark.parametrize(
    "golden", GOLDEN_PLANS, ids=lambda g: f"{g['epochs']}x{g['steps_per_epoch']}-L{g['patch_level']}"
)
def test_golden_plans(golden):
    rates = {name: golden[name] for name in ("lr", "end_lr", "warmup_epochs", "decay_ratio")}
    levels = {name: golden[name] for name in ("epochs", "steps_per_epoch", "patch_level", "epoch_rate")}
    schedule, rate = published(rates | {"scheduler": True}, **levels)
    assert [end // schedule.steps_per_epoch for end in schedule.stage_ends] == golden["level_end_epochs"]
    sides = [schedule.side_at(epoch * schedule.steps_per_epoch) for epoch in range(golden["epochs"])]
    assert [side**2 for side in sides] == golden["patch_size_by_epoch"]
    assert schedule.total_steps == len(golden["lr_by_step"])
    assert [rate.at(step) for step in range(schedule.total_steps)] == pytest.approx(golden["lr_by_step"], abs=1e-9)


def test_boundaries_of_the_published_plan():
    schedule, rate = published()
    switch, end = 150 * 5004, 300 * 5004
    assert schedule.steps_by_side() == {2: switch, 1: switch}
    assert (schedule.side_at(switch - 1), schedule.side_at(switch), schedule.side_at(end + 7)) == (2, 1, 1)
    assert (schedule.stage_at(switch - 1), schedule.stage_at(switch), schedule.stage_at(end)) == (0, 1, 1)
    assert rate.at(0) == rate.at(switch) == 0
    assert rate.at(5004) == rate.at(switch + 5004) == 1e-4
    assert rate.at(120 * 5004) == pytest.approx(1e-4)
    assert rate.at(switch - 1) == pytest.approx(1e-5, rel=1e-3)
    assert rate.at(end - 1) == pytest.approx(1e-5, rel=1e-3)
    assert rate.at(end + 7) == pytest.approx(1e-5)
    assert all(rate.at(step) > 0 for step in range(1, end, 997) if step != switch)


def test_without_scheduler_the_learning_rate_is_constant():
    _, rate = published(RATES | dict(scheduler=False, warmup_epochs=500))
    assert {rate.at(step) for step in (0, 1, 10**6)} == {1e-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epochs=1), "level 1 of 2 .2x2 patches. would get no epoch"),
        (dict(steps_per_epoch=0), "must hold at least one batch"),
        (dict(epochs=10**15), "--epochs 1000000000000000 are .* steps, above 100,000,000; lower it"),
        (dict(epoch_rate=1.0), "--epoch-rate must lie between 0 and 1"),
        (dict(patch_level=4, grid=(28, 28)), "8x8 patches, which do not tile the grid of 28x28 .* --patch-level 3"),
        (dict(patch_level=2, grid=(16, 15)), "2x2 patches, which do not tile the grid of 16x15 .* --patch-level 1"),
        (dict(patch_level=2**61), "do not tile"),
        (dict(rates=RATES | dict(warmup_epochs=121)), "less than --warmup-epochs 121 plus --decay-ratio 0.2"),
        (dict(rates=RATES | dict(warmup_epochs=-1)), "warmup_epochs must be at least 0"),
        (dict(rates=RATES | dict(decay_ratio=1.5)), "decay_ratio must be at least 0 and at most 1"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        published(**change)


def test_a_level_that_lasts_too_briefly_and_a_side_that_does_not_tile_names_the_lasting_reason():
    with pytest.raises(ValueError, match="do not tile"):
        published(epochs=1, grid=(15, 15))


def test_a_schedule_of_your_own_is_one_stage():
    schedule = own_schedule(lambda step, total: 2 if step % 2 else 4, epochs=2, steps_per_epoch=3, grid=(8, 8))
    assert schedule.sides.tolist() == [4, 2, 4, 2, 4, 2]
    assert schedule.stages == [range(6)]
    assert schedule.steps_by_side(range(3)) == {4: 2, 2: 1}
    for side in (2.0, 2.7, True, None, "2"):
        with pytest.raises(ValueError, match="at step 0; a patch side is a whole number"):
            own_schedule(lambda step, total: side, epochs=1, steps_per_epoch=3, grid=(8, 8))  # noqa: B023
    with pytest.raises(ValueError, match="do not tile a grid of 8x8"):
        own_schedule(lambda step, total: 3, epochs=1, steps_per_epoch=3, grid=(8, 8))
