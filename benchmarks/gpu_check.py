"""One command that proves and measures the GPU paths: tests, benchmarks, one file of results and its table.

    bash scripts/gpu_check.sh                                        everything that fits in ten minutes
    bash scripts/gpu_check.sh --minutes 60                           everything
    bash scripts/gpu_check.sh --only "tests,training GPT-L"          some parts or jobs again
    bash scripts/gpu_check.sh --device cpu --tiny                    the same commands on a CPU, at tiny sizes

Each job is a command of its own with a time limit, the most important first; what it has measured is kept, however it
ends. SIGINT, SIGTERM and SIGHUP end the jobs that run, record them and begin no other. Results go into
`results/DEVICE.json` (jobs that are run again take their earlier place) and, as a table between two marks, into
`RESULTS.md`, after every job. Needs PyTorch, NumPy, Pillow, tqdm and pytest; what needs more says so.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.clocks import nvidia_smi
from benchmarks.gpu_jobs import GPU_JOBS, PARTS, TINY_JOBS, Job
from benchmarks.gpu_results import Results
from utils.program import UserError, run
from utils.settings import option, parse, recipe, settings

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = "evaluator/graph.pb"  # in a folder of golden values
TAIL = 40  # lines of a failed job's output that are kept
CLOCK_SECONDS = 5  # between two looks at the clocks
PR_SET_PDEATHSIG = 1  # of prctl(2): a signal to a child whose parent has died
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # on Linux


@settings("GPU check")
class CheckSettings:
    minutes: float = option(9.5, "time in all; jobs that no longer fit are listed as not run", above=0)
    only: str | None = option(None, f"jobs or parts, separated by commas: {', '.join(PARTS)} (default: all)")
    device: str = recipe("cuda", "what is measured", choices=("cuda", "cpu"))
    tiny: bool = recipe(False, "sizes for a CPU, in about a minute: shows that every job runs, measures nothing")
    output: Path | None = option(None, "folder of results/ and RESULTS.md (default: benchmarks; --tiny: none is kept)")

    @property
    def jobs(self) -> list[Job]:
        jobs = TINY_JOBS if self.tiny else GPU_JOBS
        asked = set(PARTS if self.only is None else map(str.strip, self.only.split(",")))
        if unknown := asked - set(PARTS) - {job.name for job in jobs}:
            names = ", ".join(job.name for job in jobs)
            raise UserError(
                f"--only {', '.join(sorted(unknown))}: there are the parts {', '.join(PARTS)} and the jobs {names}."
            )
        return [job for job in jobs if job.part in asked or job.name in asked]


class Running:
    """The process groups of the jobs that run, and the signal that has ended them."""

    def __init__(self):
        self.groups: set[int] = set()
        self.ended_by: int | None = None

    @contextmanager
    def ended_by_signals(self):
        """A signal kills the groups at once; whoever waits for them then records what they have measured."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.signal(number, self._end) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _end(self, number: int, _) -> None:
        self.ended_by = number
        for group in tuple(self.groups):
            _kill_group(group, signal.SIGKILL)


def main() -> None:
    chosen = parse(CheckSettings, __doc__.split("\n")[0])
    jobs, end = chosen.jobs, time.monotonic() + 60 * chosen.minutes
    with tempfile.TemporaryDirectory() as scratch, Running().ended_by_signals() as running:
        output = chosen.output or (Path(scratch) if chosen.tiny else ROOT / "benchmarks")
        results = Results(output, machine_facts(chosen))

        def attempt(job: Job) -> dict:
            left = end - time.monotonic()
            if running.ended_by or left < min(30, job.seconds):
                return not_run(job, "interrupted" if running.ended_by else "no time left")
            return run_job(job, chosen, min(job.seconds, left), running)

        with ThreadPoolExecutor(2 if chosen.tiny else 1) as pool:  # what measures nothing need not be alone
            for record in pool.map(attempt, jobs):
                results.add(record)
        bad = results.summary([job.name for job in jobs])
    if running.ended_by:
        sys.exit(128 + running.ended_by)
    if bad:
        raise UserError(f"{bad}; what was measured is kept, and --only runs one part again.")


def machine_facts(chosen: CheckSettings) -> dict:
    command = [sys.executable, "-m", "benchmarks.machine", "--device", chosen.device]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        sentence = (finished.stderr.strip().splitlines() or ["PyTorch cannot be imported"])[-1].removeprefix("error: ")
        raise UserError(f"{sentence.rstrip('.')}; --device cpu --tiny runs every job on the CPU.")
    return json.loads(finished.stdout) | {"commit": commit(), "tiny": chosen.tiny}


def commit() -> str | None:
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None


def environment_of(job_rows: Path, chosen: CheckSettings) -> dict[str, str]:
    """Where the tests write outcomes, whether on a GPU, and the evaluator's golden values where a copy is at hand."""
    copies = [folder for folder in (ROOT / ".golden", *ROOT.parent.glob("*/golden")) if (folder / GOLDEN).exists()]
    golden = {"NPP_GOLDEN": str(copies[0])} if copies else {}
    one_thread = {"OMP_NUM_THREADS": "1"} if chosen.tiny else {}  # for two jobs run at once
    mode = {"NPP_TEST_GPU": "1" if chosen.device == "cuda" else "cpu", "NPP_TEST_ROWS": str(job_rows)}
    return golden | os.environ | one_thread | mode


def run_job(job: Job, chosen: CheckSettings, limit: float, running: Running) -> dict:
    """Runs a job to its end, or kills it with everything that it has started; returns what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        words = shlex.split(job.command)
        if job.part != "tests":
            words += ["--device", chosen.device, "--json", str(rows)]
        print(f"\n=== {job.name}, at most {limit:.0f} s: python {shlex.join(words)}", flush=True)
        started, tail = time.monotonic(), deque(maxlen=TAIL)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment_of(rows, chosen),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=PRCTL and (lambda: PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)),
        )
        running.groups.add(process.pid)
        reader = threading.Thread(target=_pass_on, args=(process.stdout, tail), daemon=True)
        reader.start()
        status, clocks = _wait(process, limit, chosen.device == "cuda", running)
        running.groups.discard(process.pid)
        reader.join(5)
        record = {"part": job.part, "command": job.command, "status": status, "clocks": clocks}
        record |= {"seconds": round(time.monotonic() - started, 1), "rows": _read_rows(rows)}
        record |= {} if status == "complete" else {"output": list(tail)}
        return {job.name: record}


def _wait(process: subprocess.Popen, limit: float, on_gpu: bool, running: Running) -> tuple[str, list[str]]:
    """How the process ended, and the clocks seen meanwhile, as `SM MHz of at most MHz, °C, W`."""
    end, seen = time.monotonic() + limit, []
    try:
        while True:
            try:
                status = process.wait(min(CLOCK_SECONDS, max(0.0, end - time.monotonic())))
                if running.ended_by:
                    return "interrupted", seen
                return ("complete" if status == 0 else f"failed with status {status}"), seen
            except subprocess.TimeoutExpired:
                if running.ended_by:  # just before this job began
                    return "interrupted", seen
                if time.monotonic() >= end:
                    return f"stopped after {limit:.0f} s", seen
                seen += [nvidia_smi()] if on_gpu else []
    finally:
        if _kill_group(process.pid, signal.SIGTERM):
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            _kill_group(process.pid, signal.SIGKILL)
        process.wait()


def _kill_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _pass_on(stream, tail: deque) -> None:
    for text in stream:
        tail.append(text.rstrip("\n"))
        print(text, end="", flush=True)


def _read_rows(path: Path) -> list[dict]:
    """Complete rows; a killed job may leave the last one unfinished."""
    rows = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return rows


def not_run(job: Job, why: str) -> dict:
    return {job.name: {"part": job.part, "command": job.command, "status": f"not run: {why}", "rows": []}}


if __name__ == "__main__":
    run(main)
