#!/usr/bin/env bash
# Starts one Python module: on this machine, on many nodes, or under Slurm.
#   scripts/launch.sh MODULE [ARGUMENTS…]
# Variables, with defaults for one machine:
#   NPROC_PER_NODE  processes per node: all its GPUs, or 1 without any
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   the same command on every node; under Slurm they follow from its own
#   MAX_RESTARTS    how often torchrun restarts dead workers (default: 3 in training and code extraction, else 0); a
#                   process alone that is not to be restarted is started without torchrun
#   PYTHON          the interpreter: .venv/bin/python of this checkout if there is one, else python3
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONOPTIMIZE                          # it would take the docstrings, which are help texts, and the assertions
# Left over from other launchers; torchrun sets its workers' own.
unset RANK WORLD_SIZE LOCAL_RANK GROUP_RANK NPP_USER_ERROR_FILE NPP_LAUNCHER_PID
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || {
    echo "error: there is no interpreter $PYTHON; give another in the variable PYTHON." >&2
    exit 2
}
start=("$PYTHON" "$root/scripts/run_module.py")

for argument in "$@"; do # help is said once
    case $argument in -h | --help) exec "${start[@]}" "$@" ;; esac
done

if [ -n "${SLURM_JOB_NODELIST:-}" ] && [ -z "${NNODES:-}" ]; then
    [ "${SLURM_STEP_NUM_TASKS:-1}" -le "${SLURM_STEP_NUM_NODES:-1}" ] || { # every task sees it, and none goes on alone
        echo "error: Slurm starts several tasks per node; start one, of which the launcher makes NPROC_PER_NODE processes." >&2
        exit 2
    }
    NNODES=${SLURM_NNODES:-1}
    NODE_RANK=${SLURM_NODEID:-0}
    if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || {
            echo "error: Slurm's scontrol does not name the nodes; give the first one's address in MASTER_ADDR." >&2
            exit 2
        }
        MASTER_ADDR=${names%%$'\n'*}
    fi
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
fi
NNODES=${NNODES:-1}
if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        NPROC_PER_NODE=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true)
    fi
    [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
fi
MAX_RESTARTS=${MAX_RESTARTS:-${DEFAULT_RESTARTS:-0}}
if [ "$NNODES $NPROC_PER_NODE $MAX_RESTARTS" = "1 1 0" ]; then
    exec "${start[@]}" "$@"
fi

export NNODES NODE_RANK=${NODE_RANK:-0} NPROC_PER_NODE MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-29500} MAX_RESTARTS
export PYTHON_EXEC=$PYTHON # torchrun's name for the workers' interpreter
# By default workers share the agents' store, which outlives them (torch 2.15): restarted workers would find the addresses
# of dead ones there, and a replaced node would never learn where to meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Workers get this many seconds to save when the job is stopped.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec "${start[@]}" utils.launch "$@"
