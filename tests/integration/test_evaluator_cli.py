"""The evaluator as users start it: numbers, reports, warnings, own references, and what it refuses."""

import json
import os
import subprocess
import sys
import tarfile
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.c2i import evaluator
from evaluations.c2i.features import ExportedFeatures, InceptionNetwork, TensorFlowFeatures
from evaluations.c2i.image_sets import ImageSet
from evaluations.c2i.metrics import kid_subsets
from evaluations.c2i.report import Report, warn_about_sets
from tests import adm_definitions
from tests.evaluator_runs import TinyClassifier, evaluate, refuse, tiny_network
from tests.inception_graph import InceptionGraph
from tests.tensorflow_reference import graph_and_answers, needs_tensorflow, synthetic_images
from utils.program import UserError

ROOT = Path(__file__).parents[2]


def test_started_as_a_file_from_any_directory(sets, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "utils").mkdir(parents=True)
    (elsewhere / "utils" / "__init__.py").write_text("raise SystemExit('the wrong utils')")
    script = ROOT / "evaluations" / "c2i" / "evaluator.py"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, script, "../ref.npz", "../sample.npz", "--features", tiny_network()]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    titles = ["Inception Score", "FID", "sFID", "Precision", "Recall", "Recognised", "Density", "Coverage"]
    assert [line.split(": ")[0] for line in lines[:8]] == titles
    assert (tmp_path / "sample.txt").read_text().splitlines() == lines[:8]
    command[2] = "nowhere.npz"
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip().startswith("error: there is no file or folder nowhere.npz")
    assert "\n" not in result.stderr.strip()


def test_numbers_of_an_exported_network(sets, monkeypatch):
    flags = ("--distances", "exact", "--batch-size", 11, "--kid-subset-size", 20)
    evaluate(monkeypatch, *sets, "--features", tiny_network(), *flags)
    report = json.loads(sets[1].with_suffix(".json").read_text())
    real, generated = (TinyClassifier()(torch.from_numpy(np.load(path)["arr_0"]).float()) for path in sets)
    metrics = report["metrics"]
    assert metrics["fid"] == pytest.approx(adm_definitions.frechet_any_rank(real[0].numpy(), generated[0].numpy()))
    assert metrics["sfid"] == pytest.approx(adm_definitions.frechet_any_rank(real[1].numpy(), generated[1].numpy()))
    expected = adm_definitions.inception_score(generated[2].double().softmax(1).numpy())
    assert metrics["inception_score"] == pytest.approx(expected, rel=1e-6)
    expected = adm_definitions.precision_recall(real[0].numpy(), generated[0].numpy())
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(expected)
    assert metrics["recognised"] == 36 / 45
    subsets = [
        adm_definitions.squared_mmd(real[0][first].numpy(), generated[0][second].numpy())
        for first, second in kid_subsets(60, 45, 20, 100)
    ]
    assert (metrics["kid"], metrics["kid_std"]) == pytest.approx((np.mean(subsets), np.std(subsets)), rel=1e-5)
    assert report["kid"] == {"subset_size": 20, "subsets": 100, "seed": 0}
    expected = adm_definitions.density_coverage(real[0].numpy(), generated[0].numpy())
    assert (metrics["density"], metrics["coverage"]) == pytest.approx(expected)
    adm = ["inception_score", "fid", "sfid", "precision", "recall"]
    assert list(metrics) == [*adm, "recognised", "kid", "kid_std", "density", "coverage"]
    assert report["network"]["backend"] == "torch.export"


def test_the_json_holds_what_is_needed_to_trust_the_numbers(sets, monkeypatch):
    evaluate(monkeypatch, *sets, "--features", tiny_network())
    report = json.loads(sets[1].with_suffix(".json").read_text())
    reference = {"name": "ref.npz", "path": str(sets[0]), "count": 60, "height": 16, "width": 16}
    assert report["reference"] == reference | {"precomputed_statistics": False}
    assert report["sample"]["count"] == 45
    assert report["sample"]["classes"] == 3
    assert report["device"] == "cpu"
    assert report["distances"] == {"arithmetic": "half", "half_overflowed": False, "neighbours": 3}
    assert len(report["network"]["sha256"]) == 64
    assert report["network"]["dtype"] == "float32"
    assert report["network"]["tf32"] is False
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["seconds"]) == {
        "network",
        "reference features",
        "sample features",
        "fid and sfid",
        "precision and recall",
        "density and coverage",
    }


def test_warnings_in_plain_words(sets, monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "odd.npz", arr_0=synthetic_images(1, 45, 16, 16), labels=np.minimum(np.arange(45), 2))
    evaluate(monkeypatch, sets[0], tmp_path / "odd.npz", "--features", tiny_network())
    warnings = json.loads((tmp_path / "odd.json").read_text())["warnings"]
    told = capsys.readouterr().err
    assert all(f"warning: {warning}" in told for warning in warnings)
    expected = [
        "holds 45 images; published numbers use 50,000",
        "holds 60 images; Precision and Recall are published with 10,000",
        "no precomputed statistics",
        "unbalanced: from 1 images (class 0) to 43 images (class 2)",
        "KID is left out: one of the sets holds 45 images, fewer than a subset of 1,000",
    ]
    for words in expected:
        assert sum(words in warning for warning in warnings) == 1


def small_graph(folder: Path) -> Path:
    return InceptionGraph(32).save(folder / "graph.pb")


def test_sizes_that_differ_and_singular_covariances_are_reported(sets, monkeypatch, tmp_path):
    np.savez(tmp_path / "larger.npz", arr_0=synthetic_images(2, 8, 24, 16), labels=np.arange(8))
    evaluate(monkeypatch, sets[0], tmp_path / "larger.npz", "--graph", small_graph(tmp_path))
    report = json.loads((tmp_path / "larger.json").read_text())
    assert sum("16 x 16 pixels and the sample of 24 x 16" in warning for warning in report["warnings"]) == 1
    assert report["singular"] == {"fid": True, "sfid": True}
    assert sum("are singular" in warning for warning in report["warnings"]) == 2
    assert "recognised" not in report["metrics"]  # Inception's classes are not the labels
    assert np.isfinite(list(report["metrics"].values())).all()


def test_too_few_images_for_density_and_coverage(sets, monkeypatch, tmp_path):
    np.savez(tmp_path / "five.npz", arr_0=synthetic_images(0, 5, 16, 16))
    evaluate(monkeypatch, tmp_path / "five.npz", sets[1], "--features", tiny_network())
    report = json.loads(sets[1].with_suffix(".json").read_text())
    assert sum("Density and Coverage are left out: they need 6 reference" in said for said in report["warnings"]) == 1
    assert not {"kid", "density", "coverage"} & set(report["metrics"])


def test_bf16_is_labelled(sets, monkeypatch, tmp_path):
    graph = small_graph(tmp_path)
    evaluate(monkeypatch, sets[1], sets[1], "--graph", graph, "--precision", "bf16", "--report", tmp_path / "own")
    assert json.loads((tmp_path / "own.json").read_text())["network"]["dtype"] == "bfloat16"
    assert (tmp_path / "own.txt").exists()
    assert not sets[1].with_suffix(".txt").exists()


def test_saved_statistics_replace_those_of_the_images(sets, monkeypatch, capsys, tmp_path):
    own = tmp_path / "own.npz"
    evaluate(monkeypatch, sets[0], "--save-stats", own, "--keep-images", 20, "--features", tiny_network())
    assert "scripts/evaluate.sh" in capsys.readouterr().out
    images = np.load(sets[0])["arr_0"]
    with np.load(own) as saved:
        assert saved["arr_0"].shape == (20, 16, 16, 3)
        np.testing.assert_array_equal(saved["arr_0"][[0, -1]], images[[0, -1]])
        pool = TinyClassifier()(torch.from_numpy(images).float())[0].double().numpy()
        np.testing.assert_allclose(saved["mu"], pool.mean(0), atol=1e-6)
        np.testing.assert_allclose(saved["sigma"], np.cov(pool, rowvar=False), atol=1e-6)
        assert saved["mu_s"].shape == (6,)
        assert saved["sigma_s"].shape == (6, 6)
    fids = []
    for reference in (sets[0], own):
        evaluate(monkeypatch, reference, sets[1], "--features", tiny_network())
        report = json.loads(sets[1].with_suffix(".json").read_text())
        fids.append((report["metrics"]["fid"], report["metrics"]["sfid"]))
    assert fids[1] == pytest.approx(fids[0], rel=1e-9)  # of all 60 images, though the file holds 20
    assert report["reference"]["precomputed_statistics"] is True
    assert report["reference"]["count"] == 20
    assert not any("no precomputed" in warning for warning in report["warnings"])
    message = refuse(monkeypatch, capsys, own, sets[1], "--graph", small_graph(tmp_path))
    assert "made with another feature network" in message


def test_folders_of_images(sets, monkeypatch, tmp_path):
    for path in sets:
        folder = path.with_suffix("")
        folder.mkdir()
        for index, image in enumerate(np.load(path)["arr_0"]):
            Image.fromarray(image).save(folder / f"{index:03}.png")
    evaluate(monkeypatch, *sets, "--features", tiny_network(), "--report", tmp_path / "npz")
    evaluate(monkeypatch, *(path.with_suffix("") for path in sets), "--features", tiny_network())
    expected, actual = (json.loads((tmp_path / name).read_text())["metrics"] for name in ("npz.json", "sample.json"))
    expected.pop("recognised")
    assert actual == expected


@needs_tensorflow
@pytest.mark.parametrize("narrower", [8, 1], ids=["small", "full width"])
def test_both_backends_and_the_definitions_agree(narrower, monkeypatch, tmp_path):
    graph, images, answers = graph_and_answers(narrower)
    for name in ("real", "generated"):
        np.savez_compressed(tmp_path / f"{name}.npz", arr_0=images[name])
    pools = {}
    original = evaluator.compare

    def recorded(real, generated, *rest):
        pools[backend] = torch.cat([real.pool, generated.pool])
        return original(real, generated, *rest)

    monkeypatch.setattr(evaluator, "compare", recorded)
    reports = {}
    for backend in ("torch", "tensorflow"):
        evaluate(monkeypatch, tmp_path / "real.npz", tmp_path / "generated.npz", "--graph", graph, "--backend", backend)
        reports[backend] = json.loads((tmp_path / "generated.json").read_text())
    ours, theirs = (reports[backend]["metrics"] for backend in ("torch", "tensorflow"))
    torch.testing.assert_close(pools["torch"], pools["tensorflow"], atol=5e-4, rtol=0)
    for name in ("fid", "sfid", "inception_score"):
        assert f"{ours[name]:.4g}" == f"{theirs[name]:.4g}" or ours[name] == pytest.approx(theirs[name], rel=1e-4)
    real, generated = (answers[f"{name}.pool"] for name in ("real", "generated"))
    assert ours["fid"] == pytest.approx(adm_definitions.frechet_any_rank(real, generated), rel=1e-4)
    real_s, generated_s = (answers[f"{name}.spatial"] for name in ("real", "generated"))
    assert ours["sfid"] == pytest.approx(adm_definitions.frechet_any_rank(real_s, generated_s), rel=1e-4)
    expected = adm_definitions.inception_score(answers["generated.probabilities"])
    assert ours["inception_score"] == pytest.approx(expected, abs=1e-3)
    for metrics in (ours, theirs):
        expected = adm_definitions.precision_recall(real, generated, np.float16)
        assert (metrics["precision"], metrics["recall"]) == pytest.approx(expected, abs=0.01)
    assert reports["torch"]["network"]["backend"] == "torch"
    assert reports["tensorflow"]["network"]["backend"].startswith("tensorflow 2")


def test_tensorflow_is_not_imported_unless_asked_for():
    code = "import sys, evaluations.c2i.evaluator; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_tensorflow_that_cannot_be_imported(sets, monkeypatch, capsys, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    message = refuse(monkeypatch, capsys, *sets, "--graph", small_graph(tmp_path), "--backend", "tensorflow")
    assert "install it with pip install -r evaluations/c2i/requirements.txt" in message


def test_the_tensorflow_process_imports_nothing_from_the_current_folder(sets, monkeypatch, capfd, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("numpy", "evaluations"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tensorflow.py").write_text("raise ImportError('not here')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with pytest.raises(UserError, match="the TensorFlow process ended with status 1"):
        TensorFlowFeatures(small_graph(tmp_path), torch.device("cpu"))
    assert "TensorFlow cannot be imported (not here)" in capfd.readouterr().err


def with_labels(folder: Path, labels: np.ndarray) -> Path:
    np.savez(folder / "labelled.npz", arr_0=synthetic_images(1, len(labels), 16, 16), labels=labels)
    return folder / "labelled.npz"


def test_refused_images_and_references(sets, monkeypatch, capsys, tmp_path):
    reference, sample = sets
    network = ("--features", tiny_network())

    def refusal(*arguments):
        return refuse(monkeypatch, capsys, *arguments)

    np.savez(tmp_path / "few.npz", arr_0=synthetic_images(0, 3, 16, 16))
    assert "holds 3 images; a covariance needs" in refusal(reference, tmp_path / "few.npz", *network)
    np.savez(tmp_path / "float.npz", arr_0=np.full((5, 8, 8, 3), np.nan, np.float32))
    assert "images must be uint8" in refusal(reference, tmp_path / "float.npz", *network)
    sample_size = with_labels(tmp_path, np.full(5, 3))
    assert "labels from 3 to 3, but the feature network knows 3 classes" in refusal(reference, sample_size, *network)
    np.savez(tmp_path / "other.npz", arr_0=np.load(reference)["arr_0"], mu=np.zeros(2048), sigma=np.eye(2048))
    assert "the reference belongs to another network" in refusal(tmp_path / "other.npz", sample, *network)
    np.savez(tmp_path / "nan.npz", arr_0=np.load(reference)["arr_0"], mu=np.full(6, np.nan), sigma=np.eye(6))
    assert "holds NaN or infinite numbers" in refusal(tmp_path / "nan.npz", sample, *network)
    eye, crooked = np.eye(6), np.eye(6)
    crooked[0, 1] = 0.5
    bad = {"negative": (-eye, eye), "crooked": (crooked, eye), "spatial": (eye, -eye)}
    for name, sigmas in bad.items():
        moments = dict(zip(("sigma", "sigma_s"), sigmas, strict=True)) | {"mu": np.zeros(6), "mu_s": np.zeros(6)}
        np.savez(tmp_path / f"{name}.npz", arr_0=np.load(reference)["arr_0"], **moments)
        assert "is no covariance" in refusal(tmp_path / f"{name}.npz", sample, *network)
    moments = {"mu": np.full(6, 1e300), "sigma": np.eye(6), "mu_s": np.zeros(6), "sigma_s": np.eye(6)}
    np.savez(tmp_path / "huge.npz", arr_0=np.load(reference)["arr_0"], **moments)
    assert "FID comes out as inf" in refusal(tmp_path / "huge.npz", sample, *network)
    assert not sample.with_suffix(".txt").exists()
    assert not sample.with_suffix(".json").exists()


def test_refused_flags(sets, monkeypatch, capsys, tmp_path):
    reference, sample = sets
    network = ("--features", tiny_network())

    def refusal(*arguments):
        return refuse(monkeypatch, capsys, *arguments)

    assert "cannot be used" in refusal(reference, sample, *network, "--device", "abacus")
    assert "give REFERENCE and SAMPLE" in refusal(reference, *network)
    assert "--batch-size must be" in refusal(reference, sample, *network, "--batch-size", 0)
    assert "bf16 works with" in refusal(reference, sample, *network, "--precision", "bf16")
    assert "--keep-images belongs to --save-stats" in refusal(reference, sample, *network, "--keep-images", 9)
    for others in (network, ("--backend", "tensorflow")):
        assert "--compile on works with" in refusal(reference, sample, *others, "--compile", "on")
    saving = (reference, "--save-stats", tmp_path / "own.npz")
    assert "--save-stats takes --precision none only" in refusal(*saving, "--precision", "bf16")
    for flag, value in (("--report", tmp_path / "x"), ("--distances", "exact"), ("--kid-subset-size", 9)):
        assert "belong to a comparison" in refusal(*saving, *network, flag, value)
    assert not (tmp_path / "own.npz").exists()
    assert not sample.with_suffix(".txt").exists()
    assert not sample.with_suffix(".json").exists()


def test_refused_outputs(sets, monkeypatch, capsys, tmp_path):
    reference, _ = sets
    network = ("--features", tiny_network())

    def refusal(*arguments):
        return refuse(monkeypatch, capsys, *arguments)

    before = reference.read_bytes()
    (tmp_path / "link.npz").symlink_to(reference)
    for output in (reference, tmp_path / "link.npz", tiny_network()):
        assert "is one of the files that are read" in refusal(reference, "--save-stats", output, *network)
    assert reference.read_bytes() == before
    folder = tmp_path / "images" / "ant"
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(folder, "ant")
    for read, output in ((folder.parent, folder / "0.png"), (tmp_path / "*.tar", tmp_path / "shard.tar")):
        before = output.read_bytes()
        assert "is one of the files that are read" in refusal(read, "--save-stats", output, *network)
        assert output.read_bytes() == before
    assert "is a device or a pipe" in refusal(reference, "--save-stats", "/dev/null", *network)


def test_a_device_without_float64_is_refused(sets, monkeypatch, capsys):
    network = tiny_network()

    def zeros(*shape, dtype=None, **options):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "zeros", zeros)
    message = refuse(monkeypatch, capsys, *sets, "--features", network, "--device", "mps")
    assert "error: --device mps cannot be used (Cannot convert" in message
    assert "try --device cpu" in message


@pytest.mark.parametrize("network", ["inception", "exported"])
def test_out_of_memory_is_told_in_a_sentence(network, sets, monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if network == "inception":
        monkeypatch.setattr(InceptionNetwork, "convolve", fail)
        flags = ("--graph", small_graph(tmp_path))
    else:
        monkeypatch.setattr(ExportedFeatures, "dimensions", lambda self, height, width: (6, 6))
        monkeypatch.setattr("evaluations.c2i.features.load_exported", lambda path, device: fail)
        flags = ("--features", tiny_network())
    message = refuse(monkeypatch, capsys, *sets, *flags, "--batch-size", 30)
    assert "does not hold 30 images at a time; use a smaller --batch-size" in message


def test_closing_a_tensorflow_that_has_ended():
    features = object.__new__(TensorFlowFeatures)
    features.pipe, theirs = Pipe()
    features.process = subprocess.Popen([sys.executable, "-c", ""])
    features.pipe.send("left")
    theirs.close()
    while features.process.poll() is None:
        time.sleep(0.01)
    features.close()


@pytest.mark.parametrize(
    ("labels", "reference_labels", "expected"),
    [
        ([0, 0, 2, 2], None, "from 0 images (class 1) to 2 images (class 0)"),
        ([0, 0, 1, 1], [0, 1, 2], "from 0 images (class 2) to 2 images (class 0)"),
        ([0, 0, 1, 1], None, None),
        ([0, 2], None, None),  # fewer images than classes: one more or less is balance
    ],
)
def test_a_class_without_images_is_unbalanced(labels, reference_labels, expected):
    sample, reference = ImageSet(), ImageSet()
    for images, own in ((sample, labels), (reference, reference_labels)):
        images.path, images.count, images.height, images.width = Path("x.npz"), 50_000, 16, 16
        images.labels = None if own is None else np.array(own)
    report = Report()
    warn_about_sets(report, reference, sample, precomputed=True)
    said = [warning for warning in report.warnings if "unbalanced" in warning]
    assert [expected in warning for warning in said] == [True] * (expected is not None)


def test_reports_are_whole_or_absent(sets, monkeypatch):
    def full(*_):
        raise UserError("disk")

    monkeypatch.setattr("evaluations.c2i.report.write_json", full)
    with pytest.raises(UserError):
        evaluate(monkeypatch, *sets, "--features", tiny_network())
    assert not sets[1].with_suffix(".json").exists()
