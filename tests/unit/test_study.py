"""The study: declarations, equal compute, what is run and what is not run again, guidance, sharing, refusals."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from scripts.study import work
from scripts.study.budget import Plans, make_budgets, pace_of
from scripts.study.commands import Commands, Run, flags_of, shown
from scripts.study.declaration import Expected, read_declaration
from scripts.study.results import loss_curve
from scripts.study.shell import Shell
from scripts.study.work import claim
from tests.fake_study import FakeShell, declare, worker
from tests.processes import fork, wait
from utils.program import UserError

STUDIES = sorted((Path(__file__).parents[2] / "scripts/studies").glob("*.toml"))
TRAININGS, SETS_TO_CHOOSE, SETS_TO_REPORT = 4, 4 * 2, 4 * 2
TWICE = 2  # every set of samples is drawn and scored
PREPARATION = 10


@pytest.fixture
def shell(tmp_path):
    return FakeShell(tmp_path / "work")


def trained(shell) -> list[str]:
    return [command.split("--run-name ")[1].split()[0] for command in shell.commands() if "train_c2i" in command]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_have_the_arms_that_the_question_needs(path):
    study = read_declaration(path)
    levels = {arm.name: study.training_flags(arm)["patch-level"] for arm in study.arm if not arm.optional}
    assert levels == {"constant": 1, "next-token": 1, "next-token-compute": 1, "npp-2": 2, "npp-3": 3}
    differing = {name for arm in study.arm if not arm.optional for name in arm.flags}
    assert differing == {"patch-level", "scheduler"}
    assert study.compare_with == ["next-token", "next-token-compute", "constant"]
    assert study.learning_rates.seed not in study.seeds


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seeds = [0, 1]", ""), "seeds is missing"),
        (("lr = 1e-3\n", ""), "training.lr is missing"),
        (("seeds = [0, 1]", "seeds = 3"), "seeds must be a list"),
        (("epochs = 2", "epochs = 2\n[extra]\nx = 1"), "extra is not an entry"),
        (("choice-seed = 1", "choice-seed = 2"), "choice-seed is one of report-seeds"),
        (('compare-with = ["base"]', 'compare-with = ["bass"]'), "there is no arm bass"),
        (('name = "npp"', 'name = "base"'), "two arms are named base"),
        (('embedded = "digits"', ""), "either embedded or path"),
        (("val-every = 15", "val-every = 16"), "val-every must be a multiple of log-every"),
        (("[data]", "[data"), "not a TOML file"),
    ],
)
def test_mistakes_in_a_declaration_are_named(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read_declaration(declare(tmp_path, change))
    with pytest.raises(UserError, match="there is no declaration"):
        read_declaration(tmp_path / "nowhere.toml")


def test_flags_are_written_as_on_the_command_line():
    assert flags_of({"epochs": 4, "lr": 1e-3, "scheduler": True, "ema": False}) == [
        "--epochs",
        "4",
        "--lr",
        "0.001",
        "--scheduler",
    ]
    assert shown(["bash", "$WORK/a b", "*.npz"]) == "bash '$WORK/a b' *.npz"


def test_an_arm_at_equal_compute_gets_as_many_epochs_as_cost_the_same(tmp_path, shell):
    added = '[[arm]]\nname = "short"\ntitle = "short"\nflags = { patch-level = 1 }\ncompute-of = "npp"\n'
    study = read_declaration(declare(tmp_path, ("epochs = 2\n", "epochs = 72\n"), added=added))
    budgets = make_budgets(study, shell)
    assert [budgets[name].epochs for name in ("base", "npp", "short")] == [72, 72, 45]
    assert budgets["short"].flops == pytest.approx(budgets["npp"].flops, rel=0.02)
    one_epoch = Plans(study, shell).flops(study.arm_named("base"), 1)
    assert one_epoch == pytest.approx(1e15 * (120 // 8) / (1_281_167 // 8))  # of these images, not of ImageNet's
    study = read_declaration(declare(tmp_path, ("epochs = 2\n", "epochs = 20\n"), added=added))
    with pytest.raises(UserError, match="no other whole number comes nearer"):
        make_budgets(study, shell)


def test_everything_is_run_once_and_nothing_a_second_time(tmp_path, shell):
    path = declare(tmp_path)
    worker(path, shell).carry_out()
    assert len(shell.commands()) == PREPARATION + TRAININGS + TWICE * (SETS_TO_CHOOSE + SETS_TO_REPORT)
    assert trained(shell) == ["base-seed-0", "npp-seed-0", "base-seed-1", "npp-seed-1"]  # seed by seed
    before = shell.commands()
    worker(path, shell).carry_out()
    assert shell.commands() == before
    assert not (shell.work / "samples/base-seed-0").exists()  # weights and seeds make them again
    sizes = [file.stat().st_size for file in (tmp_path / "tiny").rglob("*.json")]
    assert len(sizes) == TRAININGS + 1
    assert max(sizes) < 8_000
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "tiny").rglob("*.json"))


def test_guidance_is_chosen_per_arm_and_reported_on_other_samples(tmp_path, shell):
    study = worker(declare(tmp_path), shell)
    study.carry_out()
    base, npp = study.arms
    assert (study.results.guidance_of(base), study.results.guidance_of(npp)) == (1.0, 2.0)
    found = study.results.of(Run(npp, 1))
    assert set(found["choice_scores"]) == {"1", "2"}
    assert {scale: set(seeds) for scale, seeds in found["report_scores"].items()} == {"2": {"2", "3"}}
    sampled = [command for command in shell.commands() if "sample_c2i" in command and "npp-seed-1/" in command]
    seeds = [command.split("--global-seed ")[1].split()[0] for command in sampled]
    assert seeds == ["1", "1", "2", "3"]


@pytest.mark.parametrize("stop_at", [3, 12, 15, 26, 40])
def test_a_study_goes_on_where_it_stopped(tmp_path, shell, stop_at):
    path = declare(tmp_path)
    count = iter(range(1000))
    interrupted = FakeShell(shell.work, fail=lambda command: next(count) == stop_at)
    with pytest.raises(RuntimeError):
        worker(path, interrupted).carry_out()
    worker(path, shell).carry_out()
    assert sorted(trained(shell)) == ["base-seed-0", "base-seed-1", "npp-seed-0", "npp-seed-1"]
    assert not worker(path, shell).missing()
    scored = [command for command in shell.commands() if "evaluator" in command and "seed" in command]
    assert len(scored) == len(set(scored))


def test_an_added_seed_or_arm_runs_alone(tmp_path, shell):
    worker(declare(tmp_path), shell).carry_out()
    before = len(shell.commands())
    worker(declare(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 2]")), shell).carry_out()
    assert trained(shell)[TRAININGS:] == ["base-seed-2", "npp-seed-2"]
    assert len(shell.commands()) == before + 2 * (1 + TWICE * 4)
    added = '[[arm]]\nname = "npp3"\ntitle = "NPP, 3 levels"\nflags = { patch-level = 3 }\n'
    worker(declare(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 2]"), added=added), shell).carry_out()
    assert trained(shell)[TRAININGS + 2 :] == ["npp3-seed-0", "npp3-seed-1", "npp3-seed-2"]


def test_learning_rates_are_compared_before_all_else(tmp_path, shell):
    added = '[learning-rates]\narms = ["base", "npp"]\nvalues = [1e-3, 2e-3]\nseed = 9\n'
    worker(declare(tmp_path, added=added), shell).carry_out()
    first = [f"{arm}-lr-{lr}-seed-9" for arm in ("base", "npp") for lr in ("0.001", "0.002")]
    assert trained(shell)[:4] == first
    assert not any("sample_c2i" in command and "seed-9" in command for command in shell.commands())


def test_two_processes_share_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL_SECONDS", 0.05)
    path = declare(tmp_path)
    pids = [fork(worker(path, FakeShell(tmp_path / "work", seconds=0.02)).carry_out) for _ in range(2)]
    assert [wait(pid) for pid in pids] == [0, 0]
    shell = FakeShell(tmp_path / "work")
    assert len(shell.commands()) == len(set(shell.commands()))
    assert len(trained(shell)) == TRAININGS
    assert not worker(path, shell).missing()


def test_a_run_that_another_process_holds_is_left_alone(tmp_path, shell):
    study = worker(declare(tmp_path), shell)
    held = claim(shell.work / "runs/base-seed-0")
    assert claim(shell.work / "runs/base-seed-0") is None
    study._prepare_once()
    assert study._do_if_free(study.missing()[0]) is False
    held.close()
    assert study._do_if_free(study.missing()[0]) is True
    assert trained(shell) == ["base-seed-0"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("lr = 1e-3", "lr = 2e-3"), "lr"),
        (("[codes]", "[codes]\nten-crop = true"), "codes.ten-crop"),
        (("images = 20", "images = 30"), "images"),
        (("[training]", "[training]\nema = true"), "ema"),
    ],
)
def test_results_of_another_declaration_are_refused(tmp_path, shell, change, name):
    worker(declare(tmp_path), shell).carry_out()
    with pytest.raises(UserError, match=rf"was made with other settings: .*{name} \("):
        worker(declare(tmp_path, change), shell).carry_out()


def test_results_of_another_tokenizer_are_refused(tmp_path, shell):
    worker(declare(tmp_path), shell).carry_out()
    shared = tmp_path / "tiny/shared.json"
    shared.write_text(shared.read_text().replace('"abc"', '"def"'))
    elsewhere = FakeShell(tmp_path / "elsewhere")
    worker(declare(tmp_path), elsewhere).carry_out()  # nothing is missing: nothing is prepared
    assert not elsewhere.commands()
    with pytest.raises(UserError, match="made with another tokenizer"):
        worker(declare(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 2]")), elsewhere).carry_out()


def test_loss_curve_counts_the_seconds_of_training(tmp_path):
    rows = [
        {"step": 10, "images_per_second": 20.0, "flops": 100, "loss_2x2": 3.0},
        {"step": 10, "val_loss_2x2": 3.0, "val_loss_1x1": 4.0},
        {"step": 20, "images_per_second": 10.0, "flops": 300, "loss_1x1": 2.0},
        {"step": 30, "images_per_second": 10.0, "flops": 500, "loss_1x1": 2.0},
        {"step": 30, "val_loss_1x1": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = loss_curve(tmp_path / "metrics.jsonl", batch_size=4)
    assert curve == {"step": [10, 30], "flops": [100, 500], "seconds": [2.0, 10.0], "loss": [4.0, 2.5]}


def test_time_left_follows_the_runs_of_this_processor():
    expected = Expected(preparation_seconds=1, training_gflops=2, seconds_per_score=3)
    run = {
        "machine": {"processor": "this"},
        "training": {"flops": [1e9, 40e9]},
        "wall_seconds": {"training": 4.0, "scores": [1.0, 2.0, 9.0]},
    }
    pace = pace_of([run, run | {"machine": {"processor": "another"}}], "this", expected)
    assert (pace.gflops, pace.seconds_per_score, pace.measured) == (10, 2, True)
    assert pace.seconds(100e9, 5) == 20
    pace = pace_of([run], "a third", expected)
    assert (pace.gflops, pace.seconds_per_score, pace.measured) == (2, 3, False)


def test_commands_hold_no_path_of_this_machine(tmp_path):
    commands = Commands(read_declaration(declare(tmp_path)))
    words = [word for command in commands.preparation().values() for word in command]
    assert not any(os.path.isabs(word) for word in words)


def commanding(work, script: str):
    """A study's process that runs one command and holds the lock of `work`."""
    shell = Shell(work)
    return lambda: shell.run(["bash", "-c", script], work / "log.txt", claim(work))


def test_a_stopped_study_lets_its_command_save_first(tmp_path):
    script = "trap 'touch $WORK/saved; exit 143' TERM; touch $WORK/started; while true; do sleep 0.05; done"
    pid = fork(commanding(tmp_path, script), tmp_path / "output")
    until((tmp_path / "started").exists)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143
    assert (tmp_path / "saved").exists()


def test_a_command_that_outlives_its_study_keeps_the_claim(tmp_path):
    script = "touch $WORK/started; while [ ! -e $WORK/end ]; do sleep 0.05; done"
    pid = fork(commanding(tmp_path, script), tmp_path / "output")
    until((tmp_path / "started").exists)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert claim(tmp_path) is None
    (tmp_path / "end").touch()
    until(lambda: claim(tmp_path) is not None)


def test_a_command_that_fails_is_shown_with_its_last_lines(tmp_path):
    with pytest.raises(UserError, match=r"(?s)the reason\n.*ended with status 3.*the same study continues"):
        commanding(tmp_path, "echo the reason; exit 3")()


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
