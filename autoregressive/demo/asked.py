"""What a visitor asks the page for, checked before anything is drawn: each refusal is a sentence about its control."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from autoregressive.models.sampling import Sampling
from autoregressive.sample.class_names import caption, label_of
from utils.program import UserError
from utils.settings import SettingError

CONTROLS = {  # a field of `Sampling`: what the page calls it
    "cfg_scale": "guidance",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
}
MOST = {"cfg_scale": 100, "top_k": 2**20}  # of controls without an upper end: far beyond what is of use
MOST_CANDIDATES = 8
LARGEST_SEED = 2**53 - 1  # whole numbers of a browser


@dataclass(frozen=True)
class Change:
    """A picture that is drawn anew where its mask is True."""

    image: Image.Image  # of the model's size
    mask: np.ndarray  # (size, size) bool
    candidates: int


@dataclass(frozen=True)
class Asked:
    """Pictures of one class, with everything that decides them."""

    label: int
    name: str  # of the class
    count: int
    seed: int
    sampling: Sampling
    change: Change | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `Pipeline.stream` takes beside the classes."""
        values = {field.name: getattr(self.sampling, field.name) for field in dataclasses.fields(self.sampling)}
        if self.change is not None:
            values |= {field.name: getattr(self.change, field.name) for field in dataclasses.fields(self.change)}
        return values | {"seed": self.seed}


def asked_for(
    values: dict[str, Any], names: Sequence[str], usual: Sampling, most: int, change: Change | None = None
) -> Asked:
    """The request that the page's `values` make: `class`, `count`, `seed`, and `CONTROLS` by their field's name.

    Settings without a control are those of `usual`. Raises `UserError` for what is no number or out of its range, for
    a class that there is not, and for more than `most` pictures at once.
    """
    label = _label(values["class"], names)
    count = _whole(values["count"], "the number of pictures", 1, most)
    drawn = count * (change.candidates if change else 1)
    if drawn > most:
        raise UserError(
            f"{count} pictures of {change.candidates} candidates each are {drawn} to draw at once, and this page "
            f"draws {most}; ask for fewer of either."
        )
    chosen = {field: _number(values[field], control) for field, control in CONTROLS.items()}
    chosen["top_k"] = _whole(chosen["top_k"], CONTROLS["top_k"], 0)
    for field, limit in MOST.items():
        if chosen[field] > max(limit, getattr(usual, field)):
            raise UserError(f"{CONTROLS[field]} must be at most {limit}, not {chosen[field]:g}.")
    try:
        sampling = dataclasses.replace(usual, **chosen)
    except SettingError as error:
        field = str(error).split()[0]
        raise UserError(f"{CONTROLS.get(field, field)} {error.reason}.") from error
    seed = _whole(values["seed"], "the seed", 0, LARGEST_SEED)
    return Asked(label, names[label], count, seed, sampling, change)


def change_of(image: Image.Image | None, mask: np.ndarray, candidates: Any) -> Change:
    """Raises `UserError` if there is no picture, or nothing of it is painted."""
    if image is None:
        raise UserError("there is no picture to edit; upload one, or take one from the gallery.")
    if not mask.any():
        raise UserError("nothing is painted; paint over what is to be drawn anew.")
    return Change(image, mask, _whole(candidates, "the number of candidates", 1, MOST_CANDIDATES))


def _label(entry: Any, names: Sequence[str]) -> int:
    """The class that was chosen from the list (its label), or typed: a name, a label, or both as the list has them."""
    if not isinstance(entry, str):
        return label_of(entry, names, "this page")
    listed = [label for label in range(len(names)) if entry.strip() == caption(label, names)]
    return listed[0] if listed else label_of(entry[:100], names, "this page")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} must be a number.")
    if abs(value) >= 1e20:
        raise UserError(f"{what} must be a number of at most 20 digits.")
    return value


def _whole(value: Any, what: str, least: int, most: int | None = None) -> int:
    number = _number(value, what)
    if number != number or number != int(number):
        raise UserError(f"{what} must be a whole number, not {number}.")
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{what} must be {limits}, not {int(number)}.")
    return int(number)
