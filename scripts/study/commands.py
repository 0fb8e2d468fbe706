"""The study's runs, and every command that makes them, as a user would type it.

`$WORK` stands for the folder that holds codes, weights and samples.
"""

import re
import shlex
from dataclasses import dataclass

from scripts.study.declaration import Arm, Flags, Study

Command = list[str]


@dataclass(frozen=True)
class Run:
    """One training: an arm and a seed; `lr` replaces the arm's learning rate in the runs that compare several."""

    arm: Arm
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        return f"{self.arm.name}{'' if self.lr is None else f'-lr-{self.lr:g}'}-seed-{self.seed}"


class Commands:
    def __init__(self, study: Study):
        self.study = study
        data, tokenizer = study.data, study.tokenizer
        self._folder = data.path or "$WORK/data"
        self._size = {"image-size": data.image_size}
        self._vq = {
            "vq-model": tokenizer["vq-model"],
            "codebook-size": tokenizer["codebook-size"],
            "vq-ckpt": "$WORK/tokenizer/tokenizer/checkpoints/last.pt",
        }
        if "codebook-embed-dim" in tokenizer:
            self._vq["codebook-embed-dim"] = tokenizer["codebook-embed-dim"]
        self._gpt = self._size | {"downsample-size": data.pixels_per_code, "num-classes": data.classes}

    def preparation(self) -> dict[str, Command]:
        """What all runs share, step by step: tokenizer and classifier learn from the training images alone."""
        study, train, test = self.study, f"{self._folder}/train", f"{self._folder}/test"
        sizes = {"train-images": study.data.train_images, "test-images": study.data.test_images}
        judge = {"data-path": train, "val-data-path": test, "output": "$WORK/classifier.pt2"}
        learn = {"data-path": train, "results-dir": "$WORK/tokenizer", "run-name": "tokenizer"}
        codes = self._vq | self._size | {"dataset": study.name} | study.codes
        extract = "autoregressive/extract_codes_c2i"
        data = ["dataset.embedded", study.data.embedded, *flags_of({"output": self._folder} | sizes)]
        return ({"data": ["python3", "-m", *data]} if study.data.embedded else {}) | {
            "classifier": [
                *("python3", "-m", "evaluations.c2i.train_classifier"),
                *flags_of(judge | self._size | study.classifier),
            ],
            "tokenizer": script("tokenizer/train_vq", learn | self._size | study.tokenizer),
            "codes": script(extract, {"data-path": train, "code-path": "$WORK/codes"} | codes),
            "held-out codes": script(extract, {"data-path": test, "code-path": "$WORK/held_out_codes"} | codes),
            **self._yardsticks(train, test),
        }

    def _yardsticks(self, train: str, test: str) -> dict[str, Command]:
        """Statistics of the training images, and the scores of real and of reconstructed held-out ones against them."""
        reconstruct = self._vq | self._size | {"sample-dir": "$WORK/reconstructions"}
        keep = {"save-stats": "$WORK/reference.npz", "features": "$WORK/classifier.pt2"}
        keep |= {"keep-images": self.study.sampling.images}
        both = {"training images": (train, "train"), "held-out images": (test, "held-out")}
        return {
            step: script(
                "tokenizer/reconstruction_vq", {"data-path": path, "name": name, "save-originals": True} | reconstruct
            )
            for step, (path, name) in both.items()
        } | {
            "reference": [
                *("python3", "evaluations/c2i/evaluator.py", "$WORK/reconstructions/train-originals.npz"),
                *flags_of(keep),
            ],
            "scores of held-out images": self.evaluate("$WORK/reconstructions/held-out-originals.npz", "held-out"),
            "scores of reconstructions": self.evaluate("$WORK/reconstructions/held-out.npz", "reconstructions"),
        }

    def train(self, run: Run, epochs: int | None = None) -> Command:
        changed = {"lr": run.lr} if run.lr is not None else {}
        changed |= {"epochs": epochs} if epochs is not None else {}
        return script(
            "autoregressive/train_c2i",
            {
                "code-path": "$WORK/codes",
                "val-code-path": "$WORK/held_out_codes",
                "dataset": self.study.name,
                "results-dir": "$WORK/gpt",
                "run-name": run.name,
                "global-seed": run.seed,
            }
            | self._model_flags()
            | self.study.training_flags(run.arm)
            | changed,
        )

    def plan(self, arm: Arm, epochs: int | None = None) -> Command:
        """Prints the training plan of an arm and its FLOPs, for as many images as ImageNet has."""
        changed = {"epochs": epochs} if epochs is not None else {}
        flags = self._model_flags() | self.study.training_flags(arm) | changed
        return script("autoregressive/train_c2i", {"dry-run": True} | flags)

    def sample(self, run: Run, guidance: float, seed: int) -> Command:
        training = self.study.training_flags(run.arm)
        return script(
            "autoregressive/sample_c2i",
            {"gpt-ckpt": f"$WORK/gpt/{run.name}/checkpoints/last.pt", "gpt-model": training["gpt-model"]}
            | self._vq
            | self._gpt
            | {
                "image-size-eval": self.study.data.image_size,
                "num-fid-samples": self.study.sampling.images,
                "cfg-scale": float(guidance),
                "global-seed": seed,
                "sample-dir": self.sample_folder(run, guidance, seed),
            }
            | self.study.sampler,
        )

    def sample_folder(self, run: Run, guidance: float, seed: int) -> str:
        return f"$WORK/samples/{self.scores_name(run, guidance, seed)}"

    def evaluate_samples(self, run: Run, guidance: float, seed: int) -> Command:
        folder = self.sample_folder(run, guidance, seed)
        return self.evaluate(f"{folder}/*.npz", self.scores_name(run, guidance, seed))

    @staticmethod
    def scores_name(run: Run, guidance: float, seed: int) -> str:
        return f"{run.name}/guidance-{guidance:g}-seed-{seed}"

    def evaluate(self, images: str, name: str) -> Command:
        return [
            "python3",
            "evaluations/c2i/evaluator.py",
            "$WORK/reference.npz",
            images,
            *flags_of({"features": "$WORK/classifier.pt2", "report": f"$WORK/scores/{name}"} | self.study.evaluator),
        ]

    def _model_flags(self) -> Flags:
        return self._gpt | {"vocab-size": self.study.tokenizer["codebook-size"]}


def script(name: str, flags: Flags) -> Command:
    return ["bash", f"scripts/{name}.sh", *flags_of(flags)]


def flags_of(flags: Flags) -> list[str]:
    """`{"epochs": 4, "scheduler": True, "ema": False}` -> `--epochs 4 --scheduler`."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", str(value)]
    return words


def shown(command: Command) -> str:
    """As one would type it."""
    return " ".join(word if re.fullmatch(r"[\w$@%+=:,./*-]+", word) else shlex.quote(word) for word in command)
