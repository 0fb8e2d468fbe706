"""A whole study in seconds, by the real programs: two arms, two seeds, on a few digits; and the command as typed."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.study.commands import Command, Run
from scripts.study.pictures import draw_figures
from scripts.study.report import insert_into, write_report
from scripts.study.shell import ROOT, Shell
from tests import tiny_python
from tests.fake_study import declare, worker
from tests.processes import fork, wait

PROGRAMS = (
    "dataset.embedded",
    "evaluations.c2i.train_classifier",
    "evaluations.c2i.evaluator",
    "tokenizer.tokenizer_image.vq_train",
    "tokenizer.tokenizer_image.reconstruct",
    "autoregressive.train.extract_codes_c2i",
    "autoregressive.train.train_c2i",
    "autoregressive.sample.sample_c2i_ddp",
)


class ForkingShell(Shell):
    """Runs each command in a forked copy of this process, with shrunken models, and no start-up time."""

    def run(self, command: Command, log: Path, lock) -> None:
        assert wait(fork(lambda: self._run_module(command), log)) == 0, log.read_text()[-3000:]

    def output_of(self, command: Command) -> str:
        log = self.work / "output.txt"
        log.unlink(missing_ok=True)
        self.run(command, log, None)
        return log.read_text()

    def _run_module(self, command: Command) -> None:
        program, name, *flags = self._filled_in(command)
        if program == "bash":
            module = re.search(r'launch\.sh" (\S+)', (ROOT / name).read_text())[1]
        else:
            module, flags = (flags[0], flags[1:]) if name == "-m" else (name[:-3].replace("/", "."), flags)
        torch.set_num_threads(1)
        tiny_python.shrink()
        sys.argv = [module, *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_two_arms_and_two_seeds_from_the_images_to_the_report(tmp_path):
    pytest.importorskip("sklearn")
    work = tmp_path / "work"
    work.mkdir()
    for program in PROGRAMS:  # what they import, once for all
        importlib.import_module(program)
    study = worker(declare(tmp_path, ("report-seeds = [2, 3]", "report-seeds = [2]")), ForkingShell(work))
    study.carry_out()
    results, folder = study.results, tmp_path / "tiny"
    for arm, share in zip(study.arms, (1.0, 0.5), strict=True):
        found = results.of(Run(arm, 1))
        curve = found["training"]
        assert curve["step"] == [15, 30]
        assert 2 < curve["loss"][-1] < 5
        assert curve["flops"][0] / curve["flops"][-1] < share  # the first epoch is the cheaper one at 2x2
        assert curve["seconds"] == sorted(curve["seconds"])
        assert torch.__version__.startswith(found["machine"]["versions"]["torch"])
    shared = results.shared()
    assert shared["classifier"]["held_out_images"] == 40
    assert set(shared["scores"]) == {"held-out", "reconstructions"}
    report = write_report(results, study.arms).read_text()
    assert "| NPP, 2 levels | 2 | 2 |" in report
    assert "*real held-out images*" in report
    assert "Unfinished" not in report
    document = tmp_path / "evidence.md"
    document.write_text("before\n<!-- study tiny -->\nwhat was here\n<!-- end of study tiny -->\nafter\n")
    insert_into(document, results, study.arms)
    text = document.read_text()
    assert text.startswith("before\n<!-- study tiny -->")
    assert text.endswith("<!-- end of study tiny -->\nafter\n")
    assert "what was here" not in text
    pytest.importorskip("matplotlib")
    figures = [path.name for path in draw_figures(results, study.arms)]
    assert figures == ["loss.png", "quality.png", "guidance.png", "samples.png"]
    insert_into(document, results, study.arms)
    assert all(f"](tiny/{name})" in document.read_text() for name in figures)
    assert len(list((folder / "samples").glob("*.png"))) == 4


@pytest.mark.slow
def test_the_command_shows_what_will_run_and_what_it_costs(tmp_path):
    """Through bash and torch's start-up, as a user types it."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/study.sh"), declare(tmp_path), "--work", tmp_path / "work", "--dry-run"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"next-token +2 +\S+ +1\.00 +0 of 2\n", done.stdout)
    assert re.search(r"NPP, 2 levels +2 +\S+ +0\.62 +0 of 2\n", done.stdout)
    assert "for one process (as declared)" in done.stdout
    assert "bash scripts/autoregressive/train_c2i.sh --code-path $WORK/codes" in done.stdout
    assert not (tmp_path / "tiny").exists()
