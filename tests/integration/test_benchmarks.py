"""The benchmarks: what they compare with computes what it must, and the check of GPUs runs whole on a CPU."""

import importlib
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from autoregressive.models.gpt import rope_table
from autoregressive.models.sampling import draw_codes
from benchmarks import gpu_check, gpu_jobs, gpu_results
from benchmarks.decoding import draw_in_two_levels
from benchmarks.gpu_jobs import GPU_JOBS, Job
from benchmarks.published_gpt import PublishedTransformer, published_tokens
from benchmarks.published_tokenizer import as_published
from benchmarks.report import Rows, cells
from tests.golden_gpt import golden_figures, golden_model
from tests.tiny_tokenizer import smaller_tokenizer
from utils.program import UserError
from utils.settings import parse

PROGRAMS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py") if "def main()" in path.read_text()
)
FIGURES = golden_figures()
MACHINE = {"device": "cpu", "name": "A CPU", "processor": "A CPU", "matrix_instructions": ["avx2"]}
MACHINE |= {"versions": {"torch": "2.11"}, "commit": "abc", "tiny": True}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def as_published_gpt(**settings) -> PublishedTransformer:
    model = golden_model(**settings)
    published = PublishedTransformer(model.args)
    published.load_state_dict(model.state_dict())
    return published


@pytest.mark.parametrize("side", [1, 2, 4])
def test_the_published_step_has_the_golden_losses_and_gradients(side):
    model = as_published_gpt(class_dropout_prob=1e-12).train()
    codes, labels = torch.from_numpy(FIGURES["idx"]), torch.from_numpy(FIGURES["cls"])
    rope = rope_table(8 // side, 8 // side, model.args.head_dim)
    _, loss = model(codes, labels, targets=codes, patch_side=side, rope=rope)
    loss.backward()
    assert loss.item() == pytest.approx(FIGURES[f"p{side}.loss"].item(), abs=1e-5)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    expected = dict(zip(FIGURES["param_names"].tolist(), FIGURES[f"p{side}.gradnorm"].tolist(), strict=True))
    assert norms == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_published_loop_gives_the_golden_generations(scale):
    model = as_published_gpt().eval()
    labels = torch.from_numpy(FIGURES["cls"])
    codes = torch.cat(list(published_tokens(model, model, labels, 64, scale, greedy=True)), 1)
    assert codes.tolist() == FIGURES[f"gen.cfg{scale}.int-1"].tolist()


def test_the_published_tokenizer_gives_the_same_codes_and_losses():
    torch.manual_seed(0)
    ours, images = smaller_tokenizer(), torch.rand(2, 3, 32, 32) * 2 - 1
    published = as_published(smaller_tokenizer())
    published.load_state_dict(ours.state_dict())
    (image, losses, codes), (other, other_losses, other_codes) = ours(images), published(images)
    torch.testing.assert_close(other, image, atol=1e-5, rtol=1e-4)
    assert torch.equal(codes, other_codes)
    torch.testing.assert_close(other_losses[:2], losses[:2])


def test_drawing_in_two_levels_draws_the_same_codes():
    torch.manual_seed(0)
    logits, uniforms = 4 * torch.randn(500, 512), torch.rand(500, dtype=torch.float64)
    logits[:50, 3] = -torch.inf
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    assert torch.equal(draw_in_two_levels(logits, uniforms), draw_codes(logits, uniforms))


def check(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *map(str, arguments)])
    gpu_check.main()


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(monkeypatch, tmp_path):
    """Every part that a GPU runs, at tiny sizes; with the GPU tests."""
    check(monkeypatch, "--device", "cpu", "--tiny", "--output", tmp_path)
    (path,) = (tmp_path / "results").glob("*.json")
    jobs = json.loads(path.read_text())["jobs"]
    assert {job["part"] for job in jobs.values()} == {job.part for job in GPU_JOBS}
    for name, job in jobs.items():
        assert job["status"] == "complete", name
        assert job["rows"], name
        assert all(row["here"] is not None for row in job["rows"] if "unit" in row), name
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("| training GPT-Tiny") == 3
    assert "failed" not in page


def test_a_job_that_fails_or_hangs_takes_nothing_with_it(monkeypatch, tmp_path, capfd):
    """What it had measured stays; jobs run again take their place; the rest of the page is left alone."""
    (tmp_path / "RESULTS.md").write_text(f"before\n{gpu_results.MARKS[0]}\nold\n{gpu_results.MARKS[1]}\nafter\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys, time\n"
        "row = dict(what=sys.argv[1], unit='ms', here=2.0, published=4.0, ratio=2.0, floor=None, of_floor=None)\n"
        "row['more'] = {}\n"
        "open(sys.argv[-1], 'a').write(json.dumps(row) + '\\n{\"what')\n"
        "print('said', flush=True)\n"
        "time.sleep(60) if sys.argv[1] == 'hangs' else sys.exit(sys.argv[1] == 'fails')\n"
    )
    limits = {"fails": 60, "hangs": 10, "ends": 60}
    jobs = [Job("training", name, f"{program} {name}", limit) for name, limit in limits.items()]
    monkeypatch.setattr(gpu_check, "TINY_JOBS", jobs)
    monkeypatch.setattr(gpu_check, "machine_facts", lambda chosen: MACHINE)
    arguments = ("--device", "cpu", "--tiny", "--output", tmp_path)
    with pytest.raises(UserError, match=r"2 of 3 jobs did not end well \(fails, hangs\)"):
        check(monkeypatch, *arguments)
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())["jobs"]
    assert {name: job["status"] for name, job in record.items()} == {
        "fails": "failed with status 1",
        "hangs": "stopped after 10 s",
        "ends": "complete",
    }
    assert all([row["what"] for row in job["rows"]] == [name] for name, job in record.items())
    assert record["fails"]["output"] == ["said"]
    monkeypatch.setattr(gpu_check, "TINY_JOBS", [Job("training", "fails", f"{program} ends", 60)])
    check(monkeypatch, *arguments)
    assert json.loads(path.read_text())["jobs"]["fails"]["status"] == "complete"
    assert json.loads(path.read_text())["jobs"]["hangs"]["status"] == "stopped after 10 s"
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| hangs | 2 ms | 4 ms | 2.00 |" in page
    monkeypatch.setattr(gpu_check, "TINY_JOBS", [Job("training", "ends", "nothing", 60)])
    check(monkeypatch, *arguments, "--minutes", 0.1)  # what an earlier run has measured stays
    assert json.loads(path.read_text())["jobs"]["ends"]["status"] == "complete"


def test_a_signal_ends_the_job_that_runs_and_keeps_its_rows(monkeypatch, tmp_path):
    """And begins no other; a record that an earlier run has completed loses no row."""
    alive, program = tmp_path / "alive", tmp_path / "program.py"
    program.write_text(
        "import json, os, sys, time\n"
        f"rows, alive = sys.argv[-1], {str(alive)!r}\n"
        "row = dict(what=sys.argv[1], unit='ms', here=2.0, published=None, ratio=None, floor=None, of_floor=None)\n"
        "open(rows, 'a').write(json.dumps(row | {'more': {}}) + '\\n')\n"
        "if sys.argv[1] == 'hangs':\n"
        "    open(alive, 'w').write(str(os.getpid()))\n"
        "    os.kill(os.getppid(), 15)\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "machine_facts", lambda chosen: MACHINE)
    arguments = ("--device", "cpu", "--tiny", "--output", tmp_path)
    jobs = [Job("training", name, f"{program} ends", 60) for name in ("first", "second")]
    monkeypatch.setattr(gpu_check, "TINY_JOBS", jobs[:1])
    check(monkeypatch, *arguments)
    monkeypatch.setattr(gpu_check, "TINY_JOBS", [Job("training", "first", f"{program} hangs", 60), *jobs[1:]])
    monkeypatch.setattr(gpu_check, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        check(monkeypatch, *arguments)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    with pytest.raises(ProcessLookupError):
        os.kill(int(alive.read_text()), 0)
    record = json.loads(next((tmp_path / "results").glob("*.json")).read_text())["jobs"]
    assert {name: job["status"] for name, job in record.items()} == {
        "first": "interrupted",
        "second": "not run: interrupted",
    }
    assert [(row["what"], row["more"]) for row in record["first"]["rows"]] == [
        ("hangs", {}),
        ("ends", {"earlier": "abc"}),
    ]


def test_what_is_asked_for_are_parts_or_jobs():
    names = [job.name for job in GPU_JOBS]
    assert len(set(names)) == len(names)
    assert not any("," in name for name in names)
    chosen = gpu_check.CheckSettings(only="loader, training GPT-L").jobs
    assert [job.name for job in chosen] == ["training GPT-L", "loader"]


def test_refusals_are_sentences(monkeypatch):
    with pytest.raises(UserError, match="there are the parts tests, training.* and the jobs GPU tests, training GPT-B"):
        check(monkeypatch, "--only", "training,speed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="PyTorch sees no GPU.*--device cpu --tiny"):
        check(monkeypatch)


def test_rows_and_goals(tmp_path, capsys):
    rows = Rows(tmp_path / "rows", "title")
    row = rows.add("training GPT-L, batch 32, bf16, side 1", 400.0, "images/s", 200.0, 1000.0, GiB=3.14159)
    assert cells(row)[1:] == ["400 images/s", "200 images/s", "2.00", "1,000 images/s", "40%", "GiB 3.14"]
    assert gpu_results.goals(row) == ["at least 50% of the floor: missed"]
    row = rows.add("50,000 images, GPT-B, VQ-16", 250.0, "s", 500.0)
    assert row["ratio"] == 2.0
    assert gpu_results.goals(row) == ["at most 300 s: met"]
    assert cells(rows.add("what", None, "us", why="not here"))[1:] == ["-", "", "", "", "", "why not here"]
    assert len((tmp_path / "rows").read_text().splitlines()) == 3


def test_every_command_of_the_jobs_is_one_that_its_program_accepts(monkeypatch):
    """The GPU's jobs never run on a CPU; their flags are checked here."""
    for job in (*gpu_jobs.GPU_JOBS, *gpu_jobs.TINY_JOBS):
        _, module, *flags = job.command.split()
        if job.part == "tests":
            continue
        program, parsed = importlib.import_module(module), []

        def only_parse(cls, description, flags=flags, parsed=parsed):
            parsed.append(parse(cls, description, [*flags, "--device", "cpu", "--json", "rows"]))
            raise KeyboardInterrupt

        monkeypatch.setattr(program, "parse", only_parse)
        with pytest.raises(KeyboardInterrupt):
            program.main()
        assert parsed, job.name
