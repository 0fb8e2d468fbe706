"""The studies whose results are committed: complete, of the committed declaration, and told in the docs as they are."""

import json
from pathlib import Path

import pytest

from scripts.study.budget import TOLERANCE, Budget
from scripts.study.declaration import read_declaration
from scripts.study.report import Values, report_text, with_interval
from scripts.study.results import Results
from scripts.study.statistics import paired_difference

ROOT = Path(__file__).parents[2]
STUDIES = ("digits", "fashion-mnist")


def committed(name: str) -> tuple[Results, list]:
    """With the budgets that its runs had; reading a run compares its settings with the declaration's."""
    study = read_declaration(ROOT / f"scripts/studies/{name}.toml")
    arms = [arm for arm in study.arm if not arm.optional]
    folder, budgets = ROOT / "scripts/studies" / name, {}
    for arm in arms:
        run = json.loads((folder / f"runs/{arm.name}-seed-{study.seeds[0]}.json").read_text())
        budgets[arm.name] = Budget(run["settings"]["epochs"], run["training"]["flops"][-1])
    return Results(folder, study, budgets), arms


@pytest.mark.parametrize("name", STUDIES)
def test_no_run_is_left_out(name):
    results, arms = committed(name)
    assert len(arms) == 5
    assert all(results.is_chosen(run) and results.is_reported(run) for run in results.runs(arms))
    assert len(results.study.seeds) >= {"digits": 5, "fashion-mnist": 3}[name]
    assert all(results.of(run) for run in results.learning_rate_runs())
    assert len(list((results.folder / "runs").iterdir())) == len(results.runs(arms)) + 6
    assert not list(results.folder.rglob(".*"))


@pytest.mark.parametrize("name", STUDIES)
def test_equal_compute_is_equal(name):
    results, _ = committed(name)
    flops = {name: budget.flops for name, budget in results.budgets.items()}
    assert abs(flops["next-token-compute"] / flops["npp-2"] - 1) < TOLERANCE
    assert flops["constant"] == flops["next-token"]


@pytest.mark.parametrize("name", STUDIES)
def test_the_docs_hold_the_report(name):
    results, arms = committed(name)
    assert report_text(results, arms, f"../scripts/studies/{name}") in (ROOT / "docs/evidence.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_the_figures_of_the_readme(name):
    """Its differences between NPP and next-token prediction are those of the runs."""
    results, arms = committed(name)
    values, by_name = Values(results, arms), {arm.name: arm for arm in arms}
    section = " ".join((ROOT / "README.md").read_text().split("## Does it work?")[1].split("\n## ")[0].split())
    for measure in ("fid", "loss"):
        for base in ("next-token", "next-token-compute"):
            ours, theirs = (values.of(by_name[arm], measure) for arm in ("npp-2", base))
            assert with_interval(paired_difference(ours, theirs), 1, "+") in section
