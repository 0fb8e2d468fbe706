"""The 50,000-image sampler, at 64: the same images in any batch and world size, after any interruption; refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.seeds import image_labels
from tests.sampling_models import flags, run_sampler, start_sampler, write_models
from utils.program import UserError

NAME = "GPT-Tiny-c2i_B_256-size-16-size-16-VQ-Tiny-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def command(models: Path, sample_dir: Path, **changes) -> list[str]:
    defaults = dict(image_size_eval=16, num_fid_samples=64, per_proc_batch_size=7, sample_dir=sample_dir)
    return flags(models, **defaults | changes)


@pytest.fixture(scope="module")
def reference(models, tmp_path_factory):
    """An uninterrupted run of 64 images in batches of 7: the folder of its result, and what it printed."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, run_sampler(command(models, folder), folder / "printed")


def test_the_result_is_named_as_published_and_says_what_to_run_next(reference):
    folder, printed = reference
    with np.load(folder / f"{NAME}.npz", allow_pickle=False) as result:
        assert sorted(result.files) == ["arr_0", "labels"]
        assert result["arr_0"].shape == (64, 16, 16, 3)
        assert result["arr_0"].dtype == np.uint8
        assert result["arr_0"].std() > 10
        assert result["labels"].tolist() == [i % 10 for i in range(64)]
    assert f"scripts/evaluate.sh REFERENCE.npz {folder / NAME}.npz" in printed
    assert "GPT-Tiny (raw weights of" in printed
    assert "after 7 steps" in printed
    assert "warning" not in printed
    with Image.open(folder / f"{NAME}.png") as preview:
        assert preview.height == 8 * 18 - 2  # a row per class
        assert preview.width > 6 * 18 - 2
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{NAME}.npz",
        f"{NAME}.png",
        f"{NAME}.settings.json",
        "printed",
    ]


def test_the_report_holds_every_setting_and_the_hashes(reference):
    report = json.loads((reference[0] / f"{NAME}.settings.json").read_text())
    assert report["settings"]["cfg_scale"] == 2.0
    assert len(report["settings"]["gpt_sha256"]) == len(report["settings"]["tokenizer_sha256"]) == 64
    deciding = {"precision", "cfg_interval", "weights", "random_labels", "global_seed", "sampler", "conditioning"}
    assert deciding <= report["settings"].keys()
    assert report["batch_size"] == 7


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (32, 1), (1, 2), (7, 2), (32, 2)])
def test_images_depend_neither_on_batch_nor_on_world_size(models, reference, tmp_path, batch_size, world_size):
    run_sampler(command(models, tmp_path, per_proc_batch_size=batch_size), tmp_path / "printed", world_size)
    assert (tmp_path / f"{NAME}.npz").read_bytes() == (reference[0] / f"{NAME}.npz").read_bytes()


def test_another_number_of_images_starts_with_the_same_ones(models, reference, tmp_path):
    run_sampler(command(models, tmp_path, num_fid_samples=10, per_proc_batch_size=None), tmp_path / "printed")
    with np.load(tmp_path / f"{NAME}.npz") as few, np.load(reference[0] / f"{NAME}.npz") as many:
        assert np.array_equal(few["arr_0"], many["arr_0"][:10])


def test_killed_at_twenty_random_points_and_completed(models, tmp_path):
    printed = tmp_path / "printed"
    arguments, whole = (
        command(models, tmp_path / folder, num_fid_samples=20, per_proc_batch_size=3) for folder in ("killed", "whole")
    )
    run_sampler(whole, printed)
    started = time.monotonic()
    run_sampler(whole, printed)  # finds it complete: the time of starting alone
    starting = time.monotonic() - started
    expected = (tmp_path / "whole" / f"{NAME}.npz").read_bytes()
    result = tmp_path / "killed" / f"{NAME}.npz"
    chance, kills = random.Random(0), 0
    while kills < 20:
        process = start_sampler(arguments, printed)
        process.join(chance.uniform(0.3, 2.5) * starting)
        kills += process.is_alive()
        process.kill()
        process.join()
        if result.exists():  # it was complete, killed or not: start another
            assert result.read_bytes() == expected
            result.unlink()
    run_sampler(arguments, printed)
    assert result.read_bytes() == expected
    assert not (tmp_path / "killed" / f"{NAME}.partial").exists()


def test_the_script_killed_for_real_continues_where_it_was(models, reference, tmp_path):
    script = ["bash", "scripts/autoregressive/sample_c2i.sh", *command(models, tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1"}
    process = subprocess.Popen(script, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    sums = tmp_path / f"{NAME}.partial" / "sums.u32"
    while process.poll() is None and not (sums.exists() and any(sums.read_bytes())):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < np.count_nonzero(np.fromfile(sums, np.uint32)) < 64
    assert not (tmp_path / f"{NAME}.npz").exists()
    run_sampler(command(models, tmp_path), tmp_path / "printed")
    assert (tmp_path / f"{NAME}.npz").read_bytes() == (reference[0] / f"{NAME}.npz").read_bytes()


def call(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sample_c2i_ddp", *arguments])
    sample_c2i_ddp.main()


def test_a_complete_result_is_not_made_again(models, reference, monkeypatch, capsys):
    before = (reference[0] / f"{NAME}.npz").stat().st_mtime_ns
    call(monkeypatch, command(models, reference[0], per_proc_batch_size=3))  # not among the settings that decide
    assert (reference[0] / f"{NAME}.npz").stat().st_mtime_ns == before
    assert "evaluate.sh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(cfg_interval=3), r"cfg_interval \(-1 there, 3 here\)"),
        (dict(precision="bf16"), r"precision \(none there, bf16 here\)"),
        (dict(random_labels=True), r"random_labels \(False there, True here\)"),
        (dict(num_fid_samples=65), r"num_fid_samples \(64 there, 65 here\)"),
    ],
)
def test_a_result_of_other_settings_is_never_overwritten(models, reference, monkeypatch, changes, what):
    before = (reference[0] / f"{NAME}.npz").read_bytes()
    with pytest.raises(UserError, match=what):
        call(monkeypatch, command(models, reference[0], **changes))
    assert (reference[0] / f"{NAME}.npz").read_bytes() == before


def test_an_unfinished_run_of_other_settings_is_not_continued(models, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_c2i_ddp, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, command(models, tmp_path, num_fid_samples=3))
    with pytest.raises(UserError, match=r"cfg_interval \(-1 there, 3 here\)"):
        call(monkeypatch, command(models, tmp_path, num_fid_samples=3, cfg_interval=3))


def test_png_files_of_a_complete_result(models, monkeypatch, tmp_path):
    call(monkeypatch, command(models, tmp_path, num_fid_samples=3))
    before = (tmp_path / f"{NAME}.npz").stat().st_mtime_ns
    call(monkeypatch, command(models, tmp_path, num_fid_samples=3, png=True))
    assert (tmp_path / f"{NAME}.npz").stat().st_mtime_ns == before
    assert len(list((tmp_path / NAME).glob("*.png"))) == 3


def test_random_labels_png_files_and_resizing(models, monkeypatch, tmp_path):
    call(monkeypatch, command(models, tmp_path, num_fid_samples=5, image_size_eval=24, random_labels=True, png=True))
    name = NAME.replace("size-16-size-16", "size-16-size-24")
    with np.load(tmp_path / f"{name}.npz") as result:
        assert result["arr_0"].shape == (5, 24, 24, 3)
        assert result["labels"].tolist() == image_labels(np.arange(5), 10, 0, balanced=False).tolist()
        for index, image in enumerate(result["arr_0"]):
            with Image.open(tmp_path / name / f"{index:06d}.png") as png:
                assert np.array_equal(np.asarray(png), image)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(gpt_ckpt="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(vq_ckpt="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(gpt_ckpt="npp/c2i_B_256.pt"), "has not been downloaded; run: bash scripts/download.sh npp/c2i_B_256.pt"),
        (dict(gpt_model="GPT-B"), "holds GPT-Tiny, not GPT-B; give --gpt-model GPT-Tiny"),
        (dict(num_classes=20), "was trained with --num-classes 10, not 20"),
        (dict(image_size=32), r"grids of 4x4 codes \(--image-size 16\), not 8x8"),
        (dict(image_size=18), "--image-size 18 is not a multiple of --downsample-size 4"),
        (dict(downsample_size=8), "one code of 4x4 pixels; give --downsample-size 4"),
        (dict(weights="ema"), "holds no EMA weights; use --weights raw"),
        (dict(from_fsdp=True), "is not a bare state dict"),
        (dict(cfg_scale=0.5), "--cfg-scale must be at least 1, got 0.5"),
        (dict(top_p=0), "--top-p must be above 0 and at most 1, got 0.0"),
        (dict(temperature=-1), "--temperature must be at least 0"),
        (dict(top_k=-1), "--top-k must be at least 0"),
        (dict(cfg_interval=-2), "--cfg-interval must be at least -1"),
        (dict(global_seed=-1), "--global-seed must be at least 0"),
        (dict(num_classes=0), "--num-classes must be at least 1"),
        (dict(num_fid_samples=0), "--num-fid-samples must be at least 1"),
        (dict(per_proc_batch_size=0), "--per-proc-batch-size must be at least 1"),
        (dict(image_size_eval=0), "--image-size-eval must be at least 1"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(models, monkeypatch, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        call(monkeypatch, command(models, tmp_path, **changes))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_the_script_ends_a_refusal_with_status_2_and_no_traceback(models, tmp_path):
    script = ["bash", "scripts/autoregressive/sample_c2i.sh", *command(models, tmp_path, num_classes=20)]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
    process = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1


def test_a_bare_file_is_sampled_with_a_warning_that_its_size_is_not_known(models, tmp_path, monkeypatch, capsys):
    arguments = flags(models, "bare.pt", image_size_eval=16, num_fid_samples=2, sample_dir=tmp_path, from_fsdp=True)
    call(monkeypatch, arguments)
    assert "does not say at which image size it was trained; 16 is taken from --image-size" in capsys.readouterr().out
    assert (tmp_path / f"{NAME.replace('c2i_B_256', models.name)}.npz").exists()  # named after the folder, as published


def test_weights_that_give_no_finite_logits(models, tmp_path, monkeypatch):
    state = torch.load(models / "bare.pt", weights_only=True)
    state["norm.weight"].fill_(3e38)  # finite, as reading demands, but no product of it is
    torch.save(state, models / "huge.pt")
    with pytest.raises(UserError, match="logits are not finite"):
        call(monkeypatch, flags(models, "huge.pt", image_size_eval=16, num_fid_samples=2, sample_dir=tmp_path))
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(num_fid_samples=2**50), "a list of .* images takes .* PiB of memory, and .* are free; use fewer"),
        (dict(per_proc_batch_size=10**9), "a batch of .* images of 16 px takes .* TiB of memory.*--per-proc"),
        (dict(image_size_eval=10**8), "images of 100,000,000 px takes .* PiB of memory.*--image-size-eval"),
    ],
)
def test_sizes_beyond_the_memory_are_refused_before_they_are_taken(models, monkeypatch, tmp_path, changes, what):
    with pytest.raises(UserError, match=what):
        call(monkeypatch, command(models, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [100, 3 * 768 + 5])
def test_images_damaged_by_an_interruption_are_drawn_again(models, reference, monkeypatch, tmp_path, place, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sample_c2i_ddp, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(patch, command(models, tmp_path))
    with open(tmp_path / f"{NAME}.partial" / "images.u8", "r+b") as file:
        file.truncate(file.seek(0, 2) - place)  # what was lost reads as zeros: black
    call(monkeypatch, command(models, tmp_path))
    assert f"{-(-place // 768)} images in " in capsys.readouterr().out
    assert (tmp_path / f"{NAME}.npz").read_bytes() == (reference[0] / f"{NAME}.npz").read_bytes()
