#!/usr/bin/env bash
# Starts one Python module: on this machine, on many nodes, or under Slurm.
#   scripts/launch.sh MODULE [ARGUMENTS…]
# Variables, with defaults for one machine:
#   NPROC_PER_NODE  processes a node: all its GPUs, or 1 without any
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   the same command on every node; under Slurm they follow from its own
#   MAX_RESTARTS    how often torchrun restarts dead workers (default: 3 in training and code extraction, else 0); a
#                   process alone that is not to be restarted is started without torchrun
#   PYTHON          the interpreter: .venv/bin/python of this checkout if there is one, else python3
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

if [ -n "${SLURM_JOB_NODELIST:-}" ] && [ -z "${NNODES:-}" ]; then
    NNODES=${SLURM_NNODES:-1}
    NODE_RANK=${SLURM_NODEID:-0}
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
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

restarts=${MAX_RESTARTS:-${DEFAULT_RESTARTS:-0}}
if [ "$NNODES" = 1 ] && [ "$NPROC_PER_NODE" = 1 ] && [ "$restarts" = 0 ]; then
    exec "$PYTHON" "$root/scripts/run_module.py" "$@"
fi
export PYTHON_EXEC=$PYTHON  # torchrun's name for the workers' interpreter
# Leave each process its share of the cores, unless told otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC_PER_NODE - 1) / NPROC_PER_NODE))}
# By default workers share the agents' store, which outlives them (torch 2.15): restarted workers would find the addresses
# of dead ones there, and a replaced node would never learn where to meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Workers get this many seconds to save when the job is stopped.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
if [ "$NNODES" = 1 ]; then
    rendezvous=(--standalone)
else
    if [ -z "${MASTER_ADDR:-}" ]; then
        echo "error: NNODES is $NNODES but MASTER_ADDR is not set; give the address of the first node." >&2
        exit 2
    fi
    host=$([ "${NODE_RANK:-0}" = 0 ] && echo 1 || echo 0)
    rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf="is_host=$host"
        --rdzv-id="${SLURM_JOB_ID:-npp}")
fi
exec "$PYTHON" "$root/scripts/run_module.py" utils.launch --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" --max-restarts="$restarts" \
    "${rendezvous[@]}" "$root/scripts/run_module.py" "$@"
