"""Entry points: one sentence and status 2 for mistakes of the user, and memory kept between steps."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from autoregressive.models.conditioning import Conditioning, try_conditioning
from tests.processes import fork, wait
from utils.files import atomic_file, lock, lock_folder, read_json, remove_folder, sha256, write_json
from utils.program import ERROR_MARKER, LAUNCHER_PID, UserError, end_with_launcher, first_line, run
from utils.progress import progress


def outcome(error, tmp_path) -> tuple[int, str]:
    def main():
        raise error

    status = wait(fork(lambda: run(main), tmp_path / "log"))
    return status, (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("the path x is missing; give another."), "error: the path x is missing; give another.\n"),
        (
            OSError(errno.ENOSPC, "No space", "f"),
            "error: the disk is full (f); free some space and run the same command",
        ),
        (OSError(errno.EFBIG, "large"), "error: a file grows larger than the file system or `ulimit -f` allows; write"),
        (OSError(errno.ENOMEM, "no"), "error: the memory is not enough; use smaller batches"),
        (RuntimeError("No working C++ compiler found in …"), "error: torch.compile finds no C compiler; install gcc"),
        (MemoryError("Unable to allocate 9 TiB"), "error: the memory is not enough; use smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: the GPU's memory is not enough; use smaller batches"),
        (OSError(errno.ESTALE, "stale", "f"), "error: the disk or the network's file system fails (f); run the same"),
        (PermissionError(errno.EACCES, "no", "f"), "error: no permission to write or read (f); choose another path"),
    ],
)
def test_mistakes_of_the_user(error, sentence, tmp_path):
    status, text = outcome(error, tmp_path)
    assert status == 2
    assert text.startswith(sentence)
    assert text.count("\n") == 1


def test_more_memory_than_there_is(tmp_path):
    assert wait(fork(lambda: run(lambda: torch.zeros(1 << 48)), tmp_path / "log")) == 2
    assert (tmp_path / "log").read_text().startswith("error: the memory is not enough; use smaller batches")


def test_paths_that_cannot_be_right(tmp_path):
    """As the system refuses them; whoever reads these sees which path is meant."""
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for name, sentence in {
        "circle": "symlinks lead in a circle",
        "file/x": "a folder is needed where there is a file",
        ".": "a file is needed where there is a folder",
        "x" * 300: "a name is too long for the file system",
    }.items():
        (tmp_path / "log").unlink(missing_ok=True)
        path = tmp_path / name
        status = wait(fork(lambda path=path: run(path.read_bytes), tmp_path / "log"))
        assert (status, (tmp_path / "log").read_text()[:-1].count("\n")) == (2, 0)
        assert f"error: {sentence} ({path}); " in (tmp_path / "log").read_text()


def test_a_file_size_limit(tmp_path):
    def main():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with atomic_file(tmp_path / "large") as file:
            file.write(bytes(2 << 20))

    assert wait(fork(lambda: run(main), tmp_path / "log")) == 2
    assert f"error: a file grows larger than the file system or `ulimit -f` allows ({tmp_path / 'large'}); " in (
        (tmp_path / "log").read_text()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_bugs_keep_their_traceback(tmp_path):
    status, text = outcome(ZeroDivisionError("bug"), tmp_path)
    assert status == 1
    assert "Traceback" in text


def test_a_sentence_begins_its_own_line(tmp_path):
    def main():
        bar = progress(description="training", total=12)
        bar.update()
        raise UserError("something is wrong.")

    assert wait(fork(lambda: run(main), tmp_path / "log")) == 2
    assert (tmp_path / "log").read_text().endswith("\nerror: something is wrong.\n")


def test_an_error_without_words_is_named_by_its_kind():
    assert [first_line(error) for error in (NotImplementedError(), ValueError("no.\nmore"))] == [
        "NotImplementedError",
        "no",
    ]
    with pytest.raises(ValueError, match=r"does not take single torch.float32 .* \(NotImplementedError\)"):
        try_conditioning(Conditioning(), torch.zeros(2), 1, 4)


def test_interruption(tmp_path):
    assert outcome(KeyboardInterrupt(), tmp_path) == (130, "interrupted\n")


def test_only_the_first_rank_reports_and_restarts_do_not_repeat(tmp_path, monkeypatch):
    monkeypatch.setenv(ERROR_MARKER, str(tmp_path / "marker"))
    assert outcome(UserError("wrong."), tmp_path) == (2, "error: wrong.\n")
    assert outcome(UserError("wrong."), tmp_path) == (2, "error: wrong.\n")  # nothing was added to the log
    assert outcome(RuntimeError("connection closed by the rank that left"), tmp_path) == (2, "error: wrong.\n")
    assert (tmp_path / "marker").read_text() == "error: wrong.\n"  # for the other nodes


def test_news_from_other_nodes_is_waited_for(tmp_path, monkeypatch):
    """A rank whose collective fails because of a user error on another node is silent, whoever is faster."""
    monkeypatch.setenv(ERROR_MARKER, str(tmp_path / "marker"))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    threading.Timer(0.5, (tmp_path / "marker").touch).start()
    assert outcome(RuntimeError("connection closed"), tmp_path) == (2, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_worker_whose_launcher_is_gone_before_it_starts_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for launcher, status in ((os.getpid(), 0), (os.getppid(), 1)):
        monkeypatch.setenv(LAUNCHER_PID, str(launcher))
        assert wait(fork(end_with_launcher, tmp_path / "log")) == status


FAULTS = """
import resource, sys, threading
import torch
from utils.program import keep_memory_between_steps

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def count():
    def step():
        for megabytes in (4, 64, 256):
            torch.ones(megabytes << 18)
    for _ in range(20):
        step()
    before = faults()
    for _ in range(10):
        step()
    print(faults() - before)

if "keep" in sys.argv:
    keep_memory_between_steps()
thread = threading.Thread(target=count)
thread.start() if "thread" in sys.argv else count()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_allocator_keeps_memory_between_steps():
    """Page faults of ten steps that allocate 4, 64 and 256 MB, after twenty for the heap to settle."""

    def count(*how):
        done = subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    pages = 10 * (324 << 20) // resource.getpagesize()
    assert count() > pages / 2
    assert count("keep") < pages / 100
    assert count("keep", "thread") < pages / 100


def test_a_user_who_has_set_the_allocator_wins(tmp_path):
    script = (
        "from utils import program\ncalls = []\n"
        "class C: mallopt = staticmethod(lambda number, value: calls.append(number))\n"
        "program.ctypes.CDLL = lambda name: C\nprogram.keep_memory_between_steps()\nprint(sorted(calls))"
    )

    def run_with(**env):
        call = [sys.executable, "-c", script]
        return subprocess.run(call, env=os.environ | env, text=True, capture_output=True, check=True).stdout.strip()

    assert run_with() == "[-8, -3, -2, -1]"
    assert run_with(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_ARENA_MAX="4") == "[-3, -2]"


def test_files_are_complete_or_absent(tmp_path):
    with pytest.raises(TypeError), atomic_file(tmp_path / "deep/x") as file:
        file.writelines([b"half", "not bytes"])
    assert not list((tmp_path / "deep").iterdir())
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == '{\n "a": 1\n}\n'
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_lock_is_of_the_file_that_is_there(tmp_path):
    """Whoever waits while the folder is removed holds no file that nobody else can find."""
    path = tmp_path / "run/.lock"
    first, original = lock(path, "held."), fcntl.flock

    def removed_before(file, how):
        if first.closed:
            return original(file, how)
        shutil.rmtree(path.parent)
        first.close()
        return original(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_before)
        second = lock(path, "held.")
    with pytest.raises(UserError, match="held"):
        lock(path, "held.")
    second.close()


def test_a_file_system_without_locks_lets_in_or_is_refused(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock(tmp_path / ".lock", "held.").close()
    with pytest.raises(UserError, match="has no locks; choose a folder elsewhere"):
        lock(tmp_path / ".lock", "held.", required=True)


def test_a_folder_is_removed_under_its_lock(tmp_path):
    folder = tmp_path / "run"
    held = lock_folder(folder, "held.")
    (folder / "file").touch()
    (tmp_path / ".run.removed/of a killed process").mkdir(parents=True)
    remove_folder(folder, held)
    assert held.closed
    assert not list(tmp_path.iterdir())
    remove_folder(folder, None)  # there is none


def test_an_output_is_never_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(UserError, match="is a device or a pipe; name a file"), atomic_file(path):
            pass
        with pytest.raises(UserError, match="is a device or a pipe; name a file"):
            lock(Path(path), "")


@pytest.fixture
def file_size_limit():
    """A function that limits the size of files to so many bytes, until the test ends."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_what_a_library_makes_of_a_failed_write_does_not_matter(file_size_limit, tmp_path):
    file_size_limit(1 << 16)
    with pytest.raises(OSError, match="File too large"), atomic_file(tmp_path / "weights.pt") as file:
        torch.save({"w": torch.zeros(1 << 20)}, file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\x00", b"[" * 100_000])
def test_damaged_json_is_named(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x.json is damaged \(.*\); extract again"):
        read_json(tmp_path / "x.json", "extract again", "name")
