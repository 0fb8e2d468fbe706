#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: makes .venv from a requirements file once, and sets PYTHON to its interpreter.
#   setup_python requirements-dev.txt GIGABYTES
# An interpreter that already has the packages can be named instead: PYTHON=/path/to/python bash scripts/test.sh
setup_python() {
    local root stamp
    root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
    if [ -n "${PYTHON:-}" ]; then
        echo "using the interpreter $PYTHON"
        return
    fi
    PYTHON=$root/.venv/bin/python
    stamp=$root/.venv/$1-$(cat "$root"/requirements*.txt "$root"/evaluations/c2i/requirements.txt | cksum | cut -d ' ' -f 1)
    if [ ! -e "$stamp" ]; then
        echo "setting up .venv from $1 (once; about $2 GB, a few minutes)"
        "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear "$root/.venv" || {
            echo "error: python3 cannot make a virtual environment; install it with: apt-get install python3-venv" >&2
            exit 2
        }
        "$PYTHON" -m pip install --quiet --upgrade-strategy only-if-needed -r "$root/$1"
        touch "$stamp"
    fi
    export PYTHON
}
