"""What is told of weights beside how they are built: steps, recipe, licence, metrics, the program's version."""

import os
import subprocess
from pathlib import Path
from typing import Any

from pretrained_models.catalogue import published_config
from utils.checkpoint import recorded_settings
from utils.settings import default_identity

PUBLISHED_LICENSE = "mit"


def provenance(checkpoint: dict, path: Path, program: type) -> dict[str, Any]:
    """`steps`, `training`, `license` and `metrics` as `checkpoint`, read from `path`, says them; None for what it
    does not. `program`: settings of the training, of which `training` has the flags that change the result.
    """
    return {
        "steps": checkpoint.get("steps"),
        "training": _recipe(recorded_settings({"args": checkpoint.get("args")}), program),
        "license": checkpoint.get("license") or (PUBLISHED_LICENSE if published_config(path) else None),
        "metrics": checkpoint.get("metrics"),
    }


def _recipe(args: dict[str, Any], program: type) -> dict[str, Any]:
    """Of the flags of a training those that change the result: no paths of the machine that it ran on."""
    changes_result = default_identity(program).keys()
    return {name: without_folder(value) for name, value in sorted(args.items()) if name in changes_result}


def without_folder(value: Any) -> Any:
    """A file of the user's own by its name alone, where it is named by an absolute path."""
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def code_version() -> str | None:
    """The commit of this program, where git knows it."""
    root = Path(__file__).resolve().parents[1]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
