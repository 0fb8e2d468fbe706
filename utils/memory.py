"""How much main memory there is, asked before much of it is taken."""

import os
from pathlib import Path

from utils.program import UserError

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes of main memory that programs can have, with what caches would give up; at most what a container allows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min(free, _left_in_container(cgroup, free))


def _left_in_container(cgroup: Path, unlimited: int) -> int:
    """Bytes left of the limit of a control group (version 2); file caches, which it counts, are given up first."""
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        caches = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(caches["inactive_file"]) + int(caches["active_file"]))
    except (OSError, ValueError, KeyError):  # no such group, no limit ("max"), or version 1
        return unlimited


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise `UserError`, which begins with `what`, if `needed` bytes are more than all processes here may have.

    Called before such an amount is allocated: afterwards the kernel may kill the process without a word.
    """
    free = available_memory()
    if needed > free:
        raise UserError(f"{what} takes {_size(needed)} of memory, and {_size(free)} are free; {remedy}.")


def _size(amount: float) -> str:
    step = min(max(0, int(amount).bit_length() - 1) // 10, len(UNITS) - 1)
    return f"{amount / 1024**step:,.{0 if step == 0 else 1}f} {UNITS[step]}"
