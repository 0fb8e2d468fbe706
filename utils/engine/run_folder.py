"""One folder a training run: a recipe decides its name, the same command finds it again, two runs never share it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.distributed import World
from utils.files import lock_folder, write_json
from utils.program import UserError


@dataclass
class RunFolder:
    """`path/config.json`, `path/metrics.jsonl`, `path/checkpoints/{step:07d}.pt`, `path/samples/`."""

    path: Path
    lock: IO | None = None  # held while the run trains

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def default_run_name(model: str, recipe: dict) -> str:
    """`MODEL-` and eight digits that follow from the recipe: the same command continues the same run."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{model}-{digest[:8]}"


def open_run_folder(parent: Path, name: str, recipe: dict, config: dict, world: World) -> RunFolder:
    """Make the run's folder, or enter the one of the same recipe.

    `recipe` holds every setting that changes the result, `config` the whole configuration (JSON values both). Raises
    `UserError` on the main rank if the folder belongs to another recipe or is in use by another process.
    """
    folder = RunFolder(Path(parent) / name)
    if world.is_main:
        config_file = folder.path / "config.json"
        if folder.path.is_file():
            raise UserError(f"{folder.path} is a file; choose another --run-name or --results-dir.")
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock = lock_folder(
            folder.path, f"another process is training in {folder.path}; wait for it, or choose another --run-name."
        )
        if config_file.exists():
            _refuse_other_recipe(folder.path, recipe, json.loads(config_file.read_text())["recipe"])
        folder.checkpoints.mkdir(exist_ok=True)
        write_json(config_file, {"recipe": recipe, **config})
    world.barrier()
    return folder


def _refuse_other_recipe(path: Path, recipe: dict, stored: dict) -> None:
    recipe = json.loads(json.dumps(recipe))  # tuples become lists, as in the file
    different = [key for key in sorted(recipe.keys() | stored.keys()) if recipe.get(key) != stored.get(key)]
    if different:
        changes = ", ".join(f"{key} ({stored.get(key)} there, {recipe.get(key)} here)" for key in different[:3])
        raise UserError(f"the run folder {path} was trained with other settings: {changes}; "
                        "give the same settings to continue it, or another --run-name to start a new run.")  # fmt: skip
