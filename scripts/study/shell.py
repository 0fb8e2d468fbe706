"""Runs the study's commands: one process of its own for each, output into a log, stopped together with the study."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from scripts.study.commands import Command, shown
from utils.program import UserError

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 15


class Shell:
    """Commands with `$WORK` filled in, started in the project's folder."""

    def __init__(self, work: Path):
        self.work = work
        # One process for each command, also where Slurm has given this job several nodes: their tasks share the runs.
        alone = {"NNODES": "1", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "0", "PYTHON": sys.executable}
        self.environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | alone

    def run(self, command: Command, log: Path, lock: IO | None) -> None:
        """Raises `UserError` if the command fails; `lock` stays held as long as any process of the command lives."""
        inherited = () if lock is None else (lock.fileno(),)
        with open(log, "ab") as output:
            output.write(f"\n$ {shown(command)}\n".encode())
            output.flush()
            status = _status_of(
                self._filled_in(command),
                cwd=ROOT,
                env=self.environment,
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if status:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise UserError(
                f"{end}\nthe command above ended with status {status} (all of its output: {log}); "
                "after mending it, the same study continues."
            )

    def output_of(self, command: Command) -> str:
        done = subprocess.run(
            self._filled_in(command),
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"{shown(command)}\n{done.stderr.strip()}")
        return done.stdout

    def _filled_in(self, command: Command) -> list[str]:
        words = [word.replace("$WORK", str(self.work)) for word in command]
        return [
            sys.executable if words[0] == "python3" else words[0],
            *(match for w in words[1:] for match in _glob(w)),
        ]


def _glob(word: str) -> list[str]:
    """What a shell makes of a path with a star."""
    if "*" not in word:
        return [word]
    path = Path(word)
    return sorted(str(match) for match in path.parent.glob(path.name)) or [word]


def _status_of(words: list[str], **how: Any) -> int:
    """A process's exit status. SIGTERM is passed on to it (trainers save first), and ends the study afterwards."""
    process, stopped = None, []

    def pass_on(number, _frame):
        stopped.append(number)
        if process is not None:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process = subprocess.Popen(words, **how)
        if stopped:  # while it was being started
            process.send_signal(stopped[0])
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the process, too
        if process is not None:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        sys.exit(128 + stopped[0])
    return status


def clock(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
