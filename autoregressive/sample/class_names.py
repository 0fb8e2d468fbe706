"""Classes by name: those the checkpoint carries, or ImageNet's 1,000."""

import difflib
import re
from collections.abc import Sequence

import numpy as np

from utils.program import UserError


def class_names(num_classes: int, recorded: tuple[str, ...] | None) -> list[str]:
    """Names in label order; plain numbers where nothing is known."""
    if recorded and len(recorded) == num_classes:
        return list(recorded)
    if num_classes == 1000:
        from torchvision.models import ResNet18_Weights  # its metadata lists the classes; nothing is downloaded

        return list(ResNet18_Weights.DEFAULT.meta["categories"])
    return [str(label) for label in range(num_classes)]


def caption(label: int, names: Sequence[str]) -> str:
    """What stands beside images of a class."""
    return names[label] if names[label] == str(label) else f"{label} {names[label]}"


def parse_classes(text: str, names: Sequence[str], flag: str = "--classes") -> list[int]:
    """Labels of a comma-separated list of labels and names, such as `207,red panda`. Raises `UserError`.

    A name may be shortened as long as it fits one class only; a name that several classes share asks for the label.
    """
    return [label_of(entry.strip(), names, flag) for entry in text.split(",") if entry.strip()] or label_of(
        "", names, flag
    )


def label_of(entry: str | int, names: Sequence[str], flag: str) -> int:
    """The label that `entry`, a label or a name, means. Raises `UserError`, naming `flag`."""
    if isinstance(entry, bool) or not isinstance(entry, str | int | np.integer):
        raise UserError(f"{flag} takes labels 0 to {len(names) - 1}, or names, not {entry!r}.")
    entry = str(entry).strip()
    if re.fullmatch("-?[0-9]+", entry):
        if not 0 <= int(entry) < len(names):
            raise UserError(f"there is no class {entry}; {flag} takes labels 0 to {len(names) - 1}, or names.")
        return int(entry)
    wanted = entry.lower()
    matches = [label for label, name in enumerate(names) if name.lower() == wanted]
    matches = matches or [label for label, name in enumerate(names) if wanted and wanted in name.lower()]
    if len(matches) != 1:
        if matches:
            fits = f"several classes: {_listed(matches, names)}"
        else:
            near = _similar(wanted, names)
            fits = f"no class; similar are {_listed(near, names)}" if near else "no class"
        raise UserError(f"{entry!r} fits {fits}; give {flag} labels 0 to {len(names) - 1}, or names.")
    return matches[0]


def find_classes(text: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """Labels and names of the classes that fit `text`: that label, names that begin with it, that hold it, the similar.

    All of them for an empty text.
    """
    wanted = text.strip().lower()
    found = [label for label, name in enumerate(names) if wanted in (str(label), name.lower())]
    found += [label for label, name in enumerate(names) if name.lower().startswith(wanted)]
    found += [label for label, name in enumerate(names) if wanted in name.lower()]
    return [(label, names[label]) for label in dict.fromkeys(found or _similar(wanted, names))]


def _similar(wanted: str, names: Sequence[str]) -> list[int]:
    """Labels of the names that are nearest in spelling, best first; of a name of several words, any may be meant."""
    spellings = [(name.lower(), *re.split(r"[\W_]+", name.lower())) for name in names]
    near = difflib.get_close_matches(wanted, {word for words in spellings for word in words}, n=4, cutoff=0.7)
    return sorted(
        (label for label, words in enumerate(spellings) if set(near) & set(words)),
        key=lambda label: min(near.index(word) for word in spellings[label] if word in near),
    )


def _listed(labels: list[int], names: Sequence[str]) -> str:
    return ", ".join(f"{label} ({names[label]})" for label in labels[:8])
