"""One folder per training run: a recipe decides its name, the same command finds it again, two runs never share it."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from utils.distributed import World
from utils.engine.checkpoint_files import saved_steps
from utils.files import lock_folder, read_json, sweep, write_json
from utils.program import UserError
from utils.settings import json_values, refuse_differences

RAISABLE = "epochs"  # the setting that a finished run may be given more of


@dataclass(frozen=True)
class RunIdentity:
    """What decides whether a folder's run may be continued (JSON values all).

    `recipe` holds every setting that changes the result, `defaults` what an older folder that does not name one was
    trained with. `content` tells the data apart beyond their description; what a folder does not say of it, cannot
    differ. `config` is the whole configuration, of which nothing is compared.
    """

    recipe: dict[str, Any]
    defaults: dict[str, Any]
    content: dict[str, Any]
    config: dict[str, Any]


def default_run_name(model: str, recipe: dict) -> str:
    """`MODEL-` and eight digits that follow from the recipe: the same command continues the same run."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{model}-{digest[:8]}"


@dataclass
class RunFolder:
    """`path/config.json`, `path/metrics.jsonl`, `path/checkpoints/{step:07d}.pt`, `path/samples/`.

    Nothing is made before `enter`.
    """

    path: Path
    lock: IO | None = field(default=None, init=False)  # held while the run trains
    finished: tuple[int, ...] = field(default=(), init=False)  # steps at which it was at its end, before more --epochs

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def note_finished(self, steps: int) -> None:
        """Record that the run has come to its end after so many steps."""
        config = self._read_config()
        self._write_config(config | {"finished": sorted({*config.get("finished", ()), steps})})

    @contextmanager
    def enter(self, identity: RunIdentity, world: World) -> Iterator[None]:
        """Make the folder, or enter the one of the same run; a folder made here goes again if the block refuses.

        A run that has come to its end goes on if nothing but --epochs was raised. Raises `UserError` on the main rank
        if the folder belongs to another recipe, does not say to which, or is in use by another process.
        """
        if not world.is_main:
            self.finished = world.broadcast(None)
            yield
            return
        if self.path.is_file():
            raise UserError(f"{self.path} is a file; choose another --run-name or --results-dir.")
        missing = [parent for parent in self.path.parents if not parent.exists()]
        made = self._make()
        self.lock = lock_folder(
            self.path, f"another process is training in {self.path}; wait for it, or choose another --run-name."
        )
        try:
            self._open(identity)
            world.broadcast(self.finished)
            yield
        except (UserError, OSError):
            if made:
                shutil.rmtree(self.path)
                for parent in missing:
                    with suppress(OSError):  # another run has come into it
                        parent.rmdir()
            raise

    def _make(self) -> bool:
        """Whether this process has made the folder, and not another one that starts at the same time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
            return True
        except FileNotFoundError as error:  # as /proc says it
            raise UserError(
                f"the folder {self.path} cannot be made there; choose another --results-dir or --cloud-save-path."
            ) from error
        except FileExistsError:
            if not self.path.is_dir():
                raise
            return False

    def _open(self, identity: RunIdentity) -> None:
        sweep(self.path)
        sweep(self.samples)
        if (self.path / "config.json").exists():
            there = self._read_config()
            if saved_steps(self.checkpoints) or (self.path / "metrics.jsonl").exists():
                self.finished = tuple(there.get("finished", ()))
                self._refuse_another_run(identity, there)
        elif saved_steps(self.checkpoints):
            raise UserError(
                f"{self.path} has checkpoints but no config.json, so nothing says which settings they belong to; put "
                "it back, or choose another --run-name (--resume CHECKPOINT starts a new folder from one of them)."
            )
        self.checkpoints.mkdir(exist_ok=True)
        mine = {"recipe": identity.recipe, "content": identity.content, **identity.config, "finished": self.finished}
        self._write_config(json_values(mine))

    def _refuse_another_run(self, identity: RunIdentity, there: dict) -> None:
        stored, recipe = identity.defaults | there["recipe"], json_values(identity.recipe)
        at_its_end = saved_steps(self.checkpoints)[-1:] == [*self.finished[-1:]] != []
        if at_its_end and recipe[RAISABLE] > stored[RAISABLE]:
            print(f"{self.path} had come to the end of --{RAISABLE} {stored[RAISABLE]}; going on to {recipe[RAISABLE]}")
            stored[RAISABLE] = recipe[RAISABLE]
        what = f"the run folder {self.path} was trained"
        remedy = "give the same settings to continue it, or another --run-name to start a new run"
        every = dict.fromkeys(stored.keys() | recipe.keys())
        refuse_differences(what, every | stored, every | recipe, remedy)
        refuse_differences(what, there.get("content", {}), json_values(identity.content), remedy)

    def _read_config(self) -> dict:
        remedy = "put a good copy there, or choose another --run-name"
        config = read_json(self.path / "config.json", remedy, "recipe")
        kinds = {"recipe": dict, "content": dict, "finished": list}
        sound = all(isinstance(config.get(name, kind()), kind) for name, kind in kinds.items())
        sound = sound and all(type(step) is int for step in config.get("finished", []))
        if not sound or type(config["recipe"].get(RAISABLE, 1)) is not int:
            raise UserError(f"{self.path}/config.json is damaged; {remedy}.")
        return config

    def _write_config(self, config: dict) -> None:
        """Only where it says something new: a continued run must start on a full disk, too."""
        if not (self.path / "config.json").exists() or self._read_config() != config:
            write_json(self.path / "config.json", config)
