"""Kill a program at random moments, start it again by the same command until it ends, and compare what it leaves."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.processes import fork, free_port
from utils.program import run

PATIENCE = 120  # seconds for a start that nobody kills
SECOND_BLOW = 0.3  # seconds in which the other processes follow the first, as they do under a launcher


@dataclass(frozen=True)
class Subject:
    """A program to kill. `command` and `contents` take the folder of its results, which is another in each round."""

    main: Callable[[], None]
    command: Callable[[Path], list[str]]
    contents: Callable[[Path], dict]  # what must be as in an uninterrupted run: comparable values by name
    prepare: Callable[[], None] = lambda: None  # in the forked process, before `main`


@dataclass
class Figures:
    kills: int = 0
    ends: int = 0  # rounds that came to an end and were compared
    most_in_a_round: int = 0

    def __str__(self) -> str:
        return f"{self.kills} kills, {self.ends} rounds that ended alike, up to {self.most_in_a_round} kills in one"


def soak(subject: Subject, folder: Path, kills: int, processes: int = 1, seed: int = 0) -> Figures:
    """Rounds of kills at moments drawn evenly from an uninterrupted run's duration, until there were `kills`.

    Raises `AssertionError` if a round ends otherwise than the uninterrupted run, or fails without being killed.
    """
    random_moment, figures = random.Random(seed), Figures()
    began = time.monotonic()
    _run_to_the_end(subject, folder / "whole", processes)
    duration, expected = time.monotonic() - began, subject.contents(folder / "whole")
    assert expected, "nothing to compare"
    while figures.kills < kills:
        results, before = folder / f"round{figures.ends}", figures.kills
        while figures.kills < kills and _killed(subject, results, processes, duration, random_moment):
            figures.kills += 1
        _run_to_the_end(subject, results, processes)  # once more where it has ended: nothing may change
        _assert_equal(subject.contents(results), expected, results)
        shutil.rmtree(results)
        figures.ends += 1
        figures.most_in_a_round = max(figures.most_in_a_round, figures.kills - before)
    return figures


def _killed(subject: Subject, results: Path, processes: int, duration: float, moment: random.Random) -> bool:
    """Start the program and kill it, one process first and the others a moment later; False if it ended before."""
    pids = _start(subject, results, processes)
    victim = moment.randrange(processes)
    seconds, then = moment.uniform(0, duration), moment.uniform(0, SECOND_BLOW)
    statuses = _wait(pids, seconds, any_failure=True)
    blow = len(statuses) < processes and not any(statuses.values())  # none has failed by itself
    if blow and pids[victim] not in statuses:
        os.kill(pids[victim], signal.SIGKILL)
        statuses |= _wait([pid for pid in pids if pid not in statuses], then)
    for pid in pids:
        if pid not in statuses:
            os.kill(pid, signal.SIGKILL)
            statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    failed = [status for status in statuses.values() if status != 0]
    assert blow or not failed, f"failed by itself with {failed}:\n{_log(results).read_text()}"
    return bool(failed)


def _run_to_the_end(subject: Subject, results: Path, processes: int) -> None:
    statuses = _wait(_start(subject, results, processes), PATIENCE)
    assert list(statuses.values()) == [0] * processes, f"{statuses}:\n{_log(results).read_text()}"


def _start(subject: Subject, results: Path, processes: int) -> list[int]:
    port = free_port()

    def work(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = ["program", *map(str, subject.command(results))]
        subject.prepare()
        run(subject.main)

    return [fork(lambda rank=rank: work(rank), _log(results)) for rank in range(processes)]


def _log(results: Path) -> Path:
    """Outside the results: a program may take a folder that it finds for another's."""
    return results.with_name(f"{results.name}.log")


def _wait(pids: list[int], seconds: float, any_failure: bool = False) -> dict[int, int]:
    """Statuses of the processes that ended within `seconds`; with `any_failure` no longer than until one has failed."""
    end, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(pids) and time.monotonic() < end:
        for pid in pids:
            if pid not in statuses and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                statuses[pid] = os.waitstatus_to_exitcode(ended[1])
                if any_failure and statuses[pid] != 0:
                    return statuses
        time.sleep(0.002)
    return statuses


def _assert_equal(found: dict, expected: dict, results: Path) -> None:
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    named = "\n".join(f"{name}: {found.get(name)!r:.300} instead of {expected.get(name)!r:.300}" for name in different)
    assert not different, f"{_log(results).read_text()}\n{results} ended otherwise:\n{named}"
