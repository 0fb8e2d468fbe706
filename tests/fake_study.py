"""A study whose programs are imitated: their commands are counted, and write what the real ones would, at once."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.study.budget import make_budgets
from scripts.study.commands import Command
from scripts.study.declaration import read_declaration
from scripts.study.results import Results
from scripts.study.work import Worker

DECLARATION = """
title = "A tiny study"
seeds = [0, 1]
compare-with = ["base"]
[data]
embedded = "digits"
train-images = 120
test-images = 40
image-size = 32
pixels-per-code = 4
classes = 10
[classifier]
epochs = 1
[tokenizer]
vq-model = "VQ-Tiny"
codebook-size = 64
no-mirror = true
perceptual-weight = 0
disc-weight = 0
epochs = 1
global-batch-size = 8
warmup-epochs = 0
mixed-precision = "none"
num-workers = 0
[codes]
no-mirror = true
[training]
gpt-model = "GPT-Tiny"
epochs = 2
scheduler = true
warmup-epochs = 0.5
global-batch-size = 8
lr = 1e-3
mixed-precision = "none"
log-every = 5
val-every = 15
[evaluator]
kid-subset-size = 10
[sampling]
images = 20
guidance = [1.0, 2.0]
choice-seed = 1
report-seeds = [2, 3]
[expected]
preparation-seconds = 10
training-gflops = 1
seconds-per-score = 1
[[arm]]
name = "base"
title = "next-token"
flags = { patch-level = 1 }
[[arm]]
name = "npp"
title = "NPP, 2 levels"
flags = { patch-level = 2 }
"""


def declare(folder: Path, *changes: tuple[str, str], added: str = "") -> Path:
    """The declaration above in `folder/tiny.toml`, with texts replaced and something added."""
    text = DECLARATION + added
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def flag(command: Command, name: str, usual: str = "") -> str:
    return command[command.index(f"--{name}") + 1] if f"--{name}" in command else usual


class FakeShell:
    """Loss and scores follow from arm, seed and guidance: NPP is better by 0.1, best guided at 2, the base at 1."""

    def __init__(self, work: Path, seconds: float = 0.0, fail: Callable[[Command], bool] = lambda command: False):
        self.work, self.seconds, self.fail = work, seconds, fail
        self.log = work / "commands.txt"
        work.mkdir(parents=True, exist_ok=True)

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run(self, command: Command, log: Path, lock) -> None:
        if self.fail(command):
            raise RuntimeError("stopped")
        with open(self.log, "a") as file:
            file.write(" ".join(command) + "\n")
        time.sleep(self.seconds)
        command = [word.replace("$WORK", str(self.work)) for word in command]
        name = Path(command[1]).stem if command[1] != "-m" else command[2].split(".")[-1]
        getattr(self, f"_{name}", lambda command: None)(command)

    def output_of(self, command: Command) -> str:
        epochs, levels = int(flag(command, "epochs")), int(flag(command, "patch-level"))
        share = 1 if levels == 1 else 0.5 + 0.25 * 0.5
        return f"1 parameters; {1e15 * epochs * share:.6g} FLOPs in all, 0.62x the cost\n"

    def _train_classifier(self, command: Command) -> None:
        self._write(self.work / "classifier.json", {"held_out_accuracy": 0.97, "held_out_images": 40})

    def _extract_codes_c2i(self, command: Command) -> None:
        folder = Path(flag(command, "code-path")) / f"{flag(command, 'dataset')}32_codes"
        self._write(folder / "meta.json", {"tokenizer": {"hash": "abc"}})

    def _reconstruction_vq(self, command: Command) -> None:
        folder, name = Path(flag(command, "sample-dir")), flag(command, "name")
        self._write(folder / f"{name}.settings.json", {"scores": {"psnr": 20.0, "code_usage": 1.0}})
        for end in ("", "-originals"):
            self._images(folder / f"{name}{end}.npz")

    def _train_c2i(self, command: Command) -> None:
        run = Path(flag(command, "results-dir")) / flag(command, "run-name")
        loss = 2.0 + 0.01 * int(flag(command, "global-seed")) - 0.1 * (flag(command, "patch-level") == "2")
        loss += abs(float(flag(command, "lr")) - 1e-3)
        rows = [{"step": step, "images_per_second": 16.0, "flops": 1e9 * step} for step in (15, 30)]
        self._write(run / "checkpoints/last.pt", {})
        rows.insert(1, {"step": 15, "val_loss_1x1": loss + 1})
        rows.append({"step": 30, "val_loss_1x1": loss})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _sample_c2i(self, command: Command) -> None:
        assert Path(flag(command, "gpt-ckpt")).exists()
        self._images(Path(flag(command, "sample-dir")) / "samples.npz")

    def _evaluator(self, command: Command) -> None:
        if "--save-stats" in command:
            return
        found = re.search(r"/(\w+)-seed-(\d+)/guidance-([\d.]+)-seed-(\d+)/\*", command[3])
        arm, seed, guidance, sampled = found.groups() if found else ("real", 0, 1, 0)
        assert found is None or list(Path(command[3]).parent.glob("*.npz"))
        best = 2.0 if arm == "npp" else 1.0
        fid = 3 + int(seed) * (-1) ** int(seed) * 0.1 + abs(float(guidance) - best) + 0.01 * int(sampled)
        metrics = {"fid": fid, "recognised": 0.9, "precision": 0.5 + 0.1 * int(seed)}
        self._write(Path(flag(command, "report") + ".json"), {"metrics": metrics, "device": "cpu"})

    def _images(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, arr_0=np.zeros((20, 32, 32, 3), np.uint8), labels=np.arange(20) % 10)

    def _write(self, path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def worker(declaration: Path, shell, results: Path | None = None) -> Worker:
    study = read_declaration(declaration)
    arms = [arm for arm in study.arm if not arm.optional]
    found = Results(results or declaration.with_suffix(""), study, make_budgets(study, shell))
    return Worker(study, found, shell, arms)
