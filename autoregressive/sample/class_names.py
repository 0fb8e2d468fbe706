"""Classes by name: those the checkpoint carries, or ImageNet's 1,000."""

import re

from utils.program import UserError


def class_names(num_classes: int, recorded: tuple[str, ...] | None) -> list[str]:
    """Names in label order; plain numbers where nothing is known."""
    if recorded and len(recorded) == num_classes:
        return list(recorded)
    if num_classes == 1000:
        from torchvision.models import ResNet18_Weights  # its metadata lists the classes; nothing is downloaded

        return list(ResNet18_Weights.DEFAULT.meta["categories"])
    return [str(label) for label in range(num_classes)]


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Labels of a comma-separated list of labels and names, such as `207,red panda`. Raises `UserError`.

    A name may be shortened as long as it fits one class only; a name that several classes share asks for the label.
    """
    return [_label(entry.strip(), names) for entry in text.split(",") if entry.strip()] or _label("", names)


def _label(entry: str, names: list[str]) -> int:
    if re.fullmatch("-?[0-9]+", entry):
        if not 0 <= int(entry) < len(names):
            raise UserError(f"there is no class {entry}; --classes takes labels 0 to {len(names) - 1}, or names.")
        return int(entry)
    wanted = entry.lower()
    matches = [label for label, name in enumerate(names) if name.lower() == wanted]
    matches = matches or [label for label, name in enumerate(names) if wanted and wanted in name.lower()]
    if len(matches) != 1:
        found = ", ".join(f"{label} ({names[label]})" for label in matches[:8])
        fits = f"several classes: {found}" if matches else "no class"
        raise UserError(f"{entry!r} fits {fits}; give --classes labels 0 to {len(names) - 1}, or names.")
    return matches[0]
