"""Many kills of a program, of which the suite has a few: python -m tests.soak training --kills 50 --processes 2."""

import tempfile
import time
from pathlib import Path

import tests.conftest  # noqa: F401 - one thread per process: they are forked
from tests.soak.extraction import extraction
from tests.soak.killing import soak
from tests.soak.sampling import sampling
from tests.soak.training import training
from utils.program import run
from utils.settings import MAX_SEED, REQUIRED, option, parse, settings

SUBJECTS = {"training": training, "sampling": sampling, "extraction": extraction}


@settings("soak")
class SoakSettings:
    program: str = option(REQUIRED, "what to kill", choices=SUBJECTS, flag="program")
    kills: int = option(50, "kills at random moments in all", at_least=1)
    processes: int = option(1, "processes that the program runs in", at_least=1)
    seed: int = option(0, "seed of the moments", at_least=0, at_most=MAX_SEED)


def main() -> None:
    chosen = parse(SoakSettings, "Kill a program at random moments and compare what it leaves with what it should.")
    with tempfile.TemporaryDirectory(prefix="npp-soak-") as folder:
        inputs, results = Path(folder, "inputs"), Path(folder, "results")
        inputs.mkdir()
        results.mkdir()
        began = time.monotonic()
        figures = soak(SUBJECTS[chosen.program](inputs), results, chosen.kills, chosen.processes, chosen.seed)
        print(f"{chosen.program}, {chosen.processes} processes: {figures}; {time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    run(main)
