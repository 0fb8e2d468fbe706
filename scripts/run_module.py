"""Runs a module as `python -m` does, but never imports from the current folder (Python 3.10 has no other way).

python scripts/run_module.py MODULE [ARGUMENTS…]        with the project's folder on PYTHONPATH
"""

import runpy
import sys

from utils.program import start_worker

if __name__ == "__main__":
    start_worker()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
