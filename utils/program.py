"""What every entry point does first and last: tune the allocator, end user errors in one sentence and status 2."""

import ctypes
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

USER_ERROR_STATUS = 2
# The launcher names a file here. The first rank that meets a user error writes its sentence there, so that it is
# printed once; the other ranks (whose collectives then fail) stay silent, and the launcher ends them all.
ERROR_MARKER = "NPP_USER_ERROR_FILE"
LAUNCHER_PID = "NPP_LAUNCHER_PID"
NEWS_SECONDS = 5  # what a user error takes at most to become known on the other nodes


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong and what to do about it."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, for a sentence: its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`: the last line of every entry point.

    A `UserError`, a full disk, a full GPU and the like print one sentence and exit with status 2; Ctrl-C exits with
    130, a closed pipe at the output with 141, in silence; anything else is a bug and keeps its traceback.
    """
    keep_memory_between_steps()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _report(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
            _report("", 128 + signal.SIGPIPE)
        sentence = _system_sentence(error)
        if sentence:
            _report(f"error: {sentence}")
        # Another rank has said what is wrong; this failure only follows from it.
        if user_error_reported(several_nodes=os.environ.get("GROUP_WORLD_SIZE", "1") != "1"):
            _leave(USER_ERROR_STATUS)
        raise


def end_with_launcher() -> None:
    """Kill this process when torchrun is killed, whose worker it is (on Linux)."""
    if "LOCAL_RANK" in os.environ and LAUNCHER_PID in os.environ:
        with suppress(OSError, AttributeError):
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != int(os.environ[LAUNCHER_PID]):  # it was killed before
                sys.exit(1)


def keep_memory_between_steps() -> None:
    """Keep glibc from returning freed memory to the kernel after every step (docs/performance.md, "Allocator").

    By default every large block is mapped and unmapped at each use, and every first touch of a page is a page fault.
    Variables that the user has set (`MALLOC_TRIM_THRESHOLD_` and the like) win. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    settings = {  # name in the environment: (mallopt's number in malloc.h, value; -1 is the largest)
        "MALLOC_TRIM_THRESHOLD_": (-1, -1),
        "MALLOC_TOP_PAD_": (-2, 64 << 20),
        "MALLOC_MMAP_THRESHOLD_": (-3, -1),
        "MALLOC_ARENA_MAX": (-8, 1),  # a thread's own arena maps large blocks whatever the threshold
    }
    for variable, (number, value) in settings.items():
        if variable not in os.environ:
            mallopt(number, value)


SYSTEM_SENTENCES = {
    errno.ENOSPC: "the disk is full{where}; free some space and run the same command again.",
    errno.EDQUOT: "the disk quota is used up{where}; free some space and run the same command again.",
    errno.EFBIG: "a file grows larger than the file system or `ulimit -f` allows{where}; write to another place.",
    errno.ENOMEM: "the memory is not enough{where}; use smaller batches, or free what other programs hold.",
    errno.EACCES: "no permission to write or read{where}; choose another path or change its permissions.",
    errno.ELOOP: "symlinks lead in a circle{where}; mend them, or name another path.",
    errno.ENAMETOOLONG: "a name is too long for the file system{where}; give a shorter one.",
    errno.ENOTDIR: "a folder is needed where there is a file{where}; name another path.",
    errno.EISDIR: "a file is needed where there is a folder{where}; name another path.",
    errno.EEXIST: "something else is in the place of a folder{where}; move it away, or name another path.",
}
SYSTEM_SENTENCES |= dict.fromkeys(
    (errno.EIO, errno.ESTALE),
    "the disk or the network's file system fails{where}; run the same command again when it answers.",
)
SYSTEM_SENTENCES |= dict.fromkeys((errno.EPERM, errno.EROFS), SYSTEM_SENTENCES[errno.EACCES])


def _system_sentence(error: Exception) -> str | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every program imports
        return (
            "the GPU's memory is not enough; use smaller batches (in training more --gradient-accumulation-steps "
            "leave the result as it is), or free what other programs hold."
        )
    if any(told in str(error) for told in ("No working C++ compiler", "Failed to find C compiler")):  # PyTorch, Triton
        return "torch.compile finds no C compiler; install gcc and g++, or give --no-compile."
    # torch has no type of its own for main memory that is not enough
    no_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
    number = errno.ENOMEM if no_memory else getattr(error, "errno", None)
    if not (no_memory or isinstance(error, OSError)) or number not in SYSTEM_SENTENCES:
        return None
    path = getattr(error, "filename", None)
    return SYSTEM_SENTENCES[number].format(where=f" ({path})" if path else "")


def _output_is_closed() -> bool:
    """Whether the reader of a pipe at the standard output has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def user_error_reported(several_nodes: bool = False) -> bool:
    """Whether a rank has met a user error; one on another node becomes known a moment later."""
    marker = os.environ.get(ERROR_MARKER)
    end = time.monotonic() + (NEWS_SECONDS if several_nodes else 0)
    while marker and not os.path.exists(marker) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(marker) and os.path.exists(marker)


def _report(sentence: str, status: int = USER_ERROR_STATUS) -> NoReturn:
    if bars := sys.modules.get("utils.progress"):  # which not every program imports
        bars.close_bars()
    marker = os.environ.get(ERROR_MARKER)
    if marker:
        try:
            with open(marker, "x") as file:
                file.write(sentence + "\n")
        except FileExistsError:
            _leave(status)
    if sentence:
        print(sentence, file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """Exit; in a process group at once, because tearing it down waits for ranks that may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)
