"""Processes that decode images: what ends them, or keeps them from starting, ends the program in a sentence."""

import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dataset.image_batches import loaded
from tests.processes import fork, wait
from utils.distributed import World
from utils.program import UserError

CLONE_NEWNS, NOT_ALLOWED = 0x20000, 77
WORLD = World(0, 1, 0, torch.device("cpu"))


def large(number: int) -> torch.Tensor:
    """More than a pipe holds."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full((1 << 20,), number, dtype=torch.uint8)


def test_a_killed_worker_ends_the_program_in_a_sentence():
    def work():
        with pytest.raises(UserError, match=r"image worker was ended from outside \(status -9"):
            list(loaded(large, range(20), 2, WORLD))

    assert wait(fork(work), kill_after=60) == 0


PROGRAM = """
import errno, torch
from dataset.image_batches import loaded
from utils.distributed import World
from utils.program import run

def make(number):
    if number == 3:
        raise OSError(errno.EIO, "Input/output error", "image.png")
    return torch.full((1 << 20,), number, dtype=torch.uint8)

def main():
    world = World(0, 1, 0, torch.device("cpu"))
    waiting = loaded(make, range(10, 100), 1, world)
    next(waiting)  # its worker has more to send
    list(loaded(make, range(9), 1, world))

run(main)
"""


def test_an_error_beside_living_workers_ends_the_program():
    """A forked copy of this process would leave without what Python does at its end."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"error: the disk .*\(image.png\).*\n", ended.stderr)


def test_a_second_worker_that_cannot_start(monkeypatch):
    """Ends in a sentence, without the first one and without a word from PyTorch."""
    process = multiprocessing.get_context("fork").Process
    start, complaints, started = process.start, [], []

    def start_one(worker):
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(worker)
        start(worker)

    monkeypatch.setattr(process, "start", start_one)
    monkeypatch.setattr(sys, "unraisablehook", lambda found: complaints.append(found.exc_value))
    with pytest.raises(UserError, match="workers cannot be started .*temporarily unavailable"):
        next(loaded(large, range(4), 2, WORLD))
    gc.collect()
    assert [worker.is_alive() for worker in started] == [False]
    assert complaints == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # which nobody may collect
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_rank_leaves_no_worker(tmp_path):
    """Which waits for the rank to read the batch that it sends."""
    listed = tmp_path / "workers"

    def work():
        batches = loaded(large, range(100, 200), 2, WORLD)
        next(batches)
        listed.write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()) + " .")
        time.sleep(60)

    rank = fork(work)
    while not (listed.exists() and listed.read_text().endswith(".")):
        time.sleep(0.01)
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    workers, end = [int(pid) for pid in listed.read_text().split()[:-1]], time.monotonic() + 20
    assert workers
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_full_dev_shm_is_told_and_a_small_one_is_enough(tmp_path):
    """Containers have 64 MB; what a worker puts there when it is full, it would wait for in vain."""

    def work():
        if ctypes.CDLL(None).unshare(CLONE_NEWNS):
            sys.exit(NOT_ALLOWED)
        for command in ("mount --make-rprivate /", "mount -t tmpfs -o size=128k tmpfs /dev/shm"):
            if subprocess.run(command.split()).returncode:
                sys.exit(NOT_ALLOWED)
        assert [batch[0].item() for batch in loaded(large, range(4), 1, WORLD)] == list(range(4))
        with suppress(OSError), open("/dev/shm/full", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with pytest.raises(UserError, match="workers cannot be started .*no space left.*/dev/shm.*--num-workers"):
            next(loaded(large, range(2), 1, WORLD))

    status = wait(fork(work, tmp_path / "log"), kill_after=60)
    if status == NOT_ALLOWED:
        pytest.skip("mounting is not allowed here")
    assert (status, (tmp_path / "log").read_text()) == (0, "")
