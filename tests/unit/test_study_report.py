"""The study's statistics against SciPy's tests, and what its report says and does not say."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from scripts.study.report import Values, difference_cell, insert_into, nearest, report_text, with_interval, write_report
from scripts.study.results import Results
from scripts.study.statistics import Mean, mean, paired_difference
from tests.fake_study import FakeShell, declare, worker
from utils.program import UserError


def test_means_and_paired_differences_agree_with_scipy():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(1, 0.1, 5), random.normal(1.05, 0.1, 5)
    found = mean(list(ours))
    low, high = stats.t.interval(0.95, 4, loc=ours.mean(), scale=stats.sem(ours))
    assert (found.value - found.half_width, found.value + found.half_width) == pytest.approx((low, high))
    difference = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert difference.chance == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert difference.excludes_zero == (difference.chance < 0.05)
    assert mean([2.0]) == Mean(2.0, None, None, 1)


def test_only_common_seeds_are_paired():
    difference = paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 3: 5.0})
    assert (difference.value, difference.count) == (0.75, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_numbers_have_as_many_places_as_their_interval_allows():
    assert with_interval(Mean(1.83104, 0.00421, 0.5, 5), 1) == "1.8310 ± 0.0042"
    assert with_interval(Mean(0.9731, 0.0123, 0.5, 5), 100) == "97.3 ± 1.2"
    assert with_interval(Mean(0.0213, None, None, 1), 1000) == "21.3"
    assert difference_cell(Mean(-0.5, 0.1, 0.0004, 5), 1) == "**-0.50 ± 0.10** (< 0.1 %)"
    assert difference_cell(Mean(0.05, 0.1, 0.31, 5), 1) == "+0.05 ± 0.10 (31 %)"


@pytest.fixture
def study(tmp_path):
    study = worker(declare(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 2]")), FakeShell(tmp_path / "work"))
    study.carry_out()
    return study


def test_the_report_says_what_is_better_and_what_is_not_shown(study):
    text = report_text(study.results, study.arms, ".")
    base, npp = study.arms
    losses = [Values(study.results, study.arms).of(arm, "loss") for arm in (base, npp)]
    assert paired_difference(losses[1], losses[0]).value == pytest.approx(-0.1)
    assert "| NPP, 2 levels | 3 | 2 | " in text
    verdict = re.search(r"- \*\*NPP, 2 levels\*\*, compared with next-token: (.*)\.", text)[1]
    better, open_ = verdict.split("; ")
    assert better == "better in held-out loss"
    assert open_ == "no difference shown (the interval contains zero) in recognised, FID, Precision and training time"
    assert "recognises 97.0 % of the held-out images" in text
    assert "Unfinished" not in text
    assert "| arm | 25 % of its epochs | 50 % of its epochs | 75 % of its epochs | 100 % of its epochs |" in text
    assert "There are 40 of them" in text


def test_scores_are_means_over_all_sets_and_all_seeds(study):
    npp = study.arms[1]
    scores = [study.results.reported(run) for run in study.results.runs([npp])]
    assert [len(sets) for sets in scores] == [2, 2, 2]
    values = Values(study.results, study.arms).of(npp, "fid")
    assert values == {seed: np.mean([one["fid"] for one in sets]) for seed, sets in enumerate(scores)}
    assert math.isclose(np.mean(list(values.values())), Values(study.results, study.arms).mean(npp, "fid").value)


def test_a_study_under_way_says_so(study):
    (study.results.folder / "runs/npp-seed-2.json").unlink()
    text = report_text(study.results, study.arms, ".")
    assert "Unfinished: 3 of 6 runs" in text  # without it NPP's guidance is not known, so nothing of it is reported
    assert "| NPP, 2 levels | 2 | 2 | " in text


def test_nothing_to_report_is_said(tmp_path):
    study = worker(declare(tmp_path), FakeShell(tmp_path / "work"))
    with pytest.raises(UserError, match="holds no finished run yet"):
        write_report(study.results, study.arms)


def report_with_rates(tmp_path, values: str) -> str:
    added = f'[learning-rates]\narms = ["base", "npp"]\nvalues = {values}\nseed = 9\n'
    study = worker(declare(tmp_path, added=added), FakeShell(tmp_path / "work"))
    study.carry_out()
    return report_text(study.results, study.arms, ".")


def test_learning_rates_stand_in_the_appendix(tmp_path):
    text = report_with_rates(tmp_path, "[5e-4, 1e-3, 2e-3]")
    assert "| next-token | 2.0905 | **2.0900** | 2.0910 |" in text
    assert "next-token: 0.001 is best; 0.001 is used. NPP, 2 levels: 0.001 is best; 0.001 is used." in text


def test_a_learning_rate_at_the_end_of_the_range_is_said(tmp_path):
    text = report_with_rates(tmp_path, "[1e-3, 2e-3, 4e-3]")
    assert "next-token: 0.001 is best, the first or last that was tried; 0.001 is used." in text
    assert "NPP, 2 levels differs from next-token by -0.1000 at each arm's own best rate, by -0.1000 at" in text


def test_the_loss_on_the_way_is_that_of_the_nearest_validation():
    curve = {"step": [10, 20, 30, 40, 45], "loss": [5.0, 4.0, 3.0, 2.0, 1.0]}
    assert [nearest(curve, quarter / 4) for quarter in (1, 2, 3, 4)] == [5.0, 4.0, 3.0, 1.0]


def test_the_report_is_put_between_its_marks_only(study, tmp_path):
    document = tmp_path / "docs/evidence.md"
    document.parent.mkdir()
    document.write_text("# Title\n\n<!-- study other -->\n")
    with pytest.raises(UserError, match="has no lines <!-- study tiny --> and <!-- end of study tiny -->"):
        insert_into(document, study.results, study.arms)
    document.write_text("a\n<!-- study tiny -->\nwhat was here\n<!-- end of study tiny -->\nb\n")
    for _ in range(2):
        insert_into(document, study.results, study.arms)
        text = document.read_text()
        assert text.startswith("a\n<!-- study tiny -->\n\n")
        assert text.endswith("<!-- end of study tiny -->\nb\n")
        assert "what was here" not in text


def test_equal_compute_stands_in_the_table_as_it_was_spent(study):
    flops = [found["training"]["flops"][-1] for found in map(study.results.of, study.results.runs(study.arms))]
    assert set(flops) == {30e9}
    assert report_text(study.results, study.arms, ".").count("| 3e+10 | 1.000 |") == 2


def test_results_are_plain_json(study):
    assert isinstance(study.results, Results)
    for path in study.results.folder.rglob("*.json"):
        assert all(line.startswith((" ", "{", "}")) for line in path.read_text().splitlines())
        assert json.loads(path.read_text())["settings"]
