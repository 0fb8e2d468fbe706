"""One folder per training run: a recipe decides its name, the same command finds it again, two runs never share it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.distributed import World
from utils.engine.checkpoint_files import saved_steps
from utils.files import lock_folder, write_json
from utils.program import UserError
from utils.settings import json_values, refuse_differences

RAISABLE = "epochs"  # the setting that a finished run may be given more of


@dataclass
class RunFolder:
    """`path/config.json`, `path/metrics.jsonl`, `path/checkpoints/{step:07d}.pt`, `path/samples/`."""

    path: Path
    lock: IO | None = None  # held while the run trains
    finished: tuple[int, ...] = ()  # steps at which the run was at its end, before --epochs was raised

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def note_finished(self, steps: int) -> None:
        """Record that the run has come to its end after so many steps."""
        config = json.loads((self.path / "config.json").read_text())
        write_json(self.path / "config.json", config | {"finished": sorted({*config["finished"], steps})})


def default_run_name(model: str, recipe: dict) -> str:
    """`MODEL-` and eight digits that follow from the recipe: the same command continues the same run."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{model}-{digest[:8]}"


def open_run_folder(path: Path, recipe: dict, defaults: dict, config: dict, world: World) -> RunFolder:
    """Make the run's folder, or enter the one of the same recipe.

    `recipe` holds every setting that changes the result, `defaults` what an older folder that does not name one was
    trained with, `config` the whole configuration (JSON values all). A run that has come to its end goes on if nothing
    but --epochs was raised. Raises `UserError` on the main rank if the folder belongs to another recipe or is in use by
    another process.
    """
    folder = RunFolder(path)
    if world.is_main:
        config_file = path / "config.json"
        if path.is_file():
            raise UserError(f"{path} is a file; choose another --run-name or --results-dir.")
        path.mkdir(parents=True, exist_ok=True)
        folder.lock = lock_folder(
            path, f"another process is training in {path}; wait for it, or choose another --run-name."
        )
        if config_file.exists():
            there = json.loads(config_file.read_text())
            stored, folder.finished = defaults | there["recipe"], tuple(there.get("finished", ()))
            at_its_end = saved_steps(folder.checkpoints)[-1:] == [*folder.finished[-1:]] != []
            if at_its_end and recipe[RAISABLE] > stored[RAISABLE]:
                print(f"{path} had come to the end of --{RAISABLE} {stored[RAISABLE]}; going on to {recipe[RAISABLE]}")
                stored[RAISABLE] = recipe[RAISABLE]
            remedy = "give the same settings to continue it, or another --run-name to start a new run"
            there, here = (
                dict.fromkeys(stored.keys() | recipe.keys()) | side for side in (stored, json_values(recipe))
            )
            refuse_differences(f"the run folder {path} was trained", there, here, remedy)
        folder.checkpoints.mkdir(exist_ok=True)
        write_json(config_file, {"recipe": recipe, **config, "finished": folder.finished})
    folder.finished = world.broadcast(folder.finished)
    return folder
