"""Runs a module as `python -m` does, but never imports from the current folder (Python 3.10 has no other way).

python scripts/run_module.py MODULE [ARGUMENTS…]        with the project's folder on PYTHONPATH
"""

import importlib.util
import runpy
import signal
import sys

from utils.program import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "save now", which the launcher passes on, before training begins
    if importlib.util.find_spec("torch") is None:
        print(
            f"error: {sys.executable} has no PyTorch; start programs by scripts/*.sh, which find .venv, activate it, "
            "or name an interpreter in the variable PYTHON.",
            file=sys.stderr,
        )
        sys.exit(2)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
