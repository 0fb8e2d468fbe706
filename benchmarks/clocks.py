"""What nvidia-smi says of the GPU in use; needs no PyTorch, so that whoever asks holds no memory on it."""

import os
import subprocess

CLOCKS = "clocks.sm,clocks.max.sm,temperature.gpu,power.draw"


def nvidia_smi(query: str = CLOCKS) -> str:
    """The answer to a `--query-gpu`, such as `1980 MHz, 1980 MHz, 61, 655 W`; empty where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={visible}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (finished.stdout.splitlines() or [""])[0].strip() if finished.returncode == 0 else ""
