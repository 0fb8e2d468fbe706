"""What every entry point does first and last: tune the allocator, end user errors in one sentence and status 2."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

USER_ERROR_STATUS = 2
# The launcher names a file here; the first rank that meets a user error creates it, so that the sentence is printed
# once, the other ranks (whose collectives then fail) stay silent, and elastic restarts do not repeat the mistake.
ERROR_MARKER = "NPP_USER_ERROR_FILE"
LAUNCHER_PID = "NPP_LAUNCHER_PID"


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong and what to do about it."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`: the last line of every entry point.

    A `UserError`, a full disk, a full GPU and a refused permission print one sentence and exit with status 2; Ctrl-C
    exits with 130; anything else is a bug and keeps its traceback.
    """
    keep_memory_between_steps()
    try:
        main()
    except UserError as error:
        _report(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except Exception as error:
        sentence = _system_sentence(error)
        if sentence:
            _report(f"error: {sentence}")
        if _reported():  # another rank has said what is wrong; this failure only follows from it
            _leave(USER_ERROR_STATUS)
        raise


def start_worker() -> None:
    """First of all in torchrun's processes: end now if a mistake has been reported, and later if torchrun is killed."""
    if _reported():  # restarted after a mistake that a restart cannot mend
        sys.exit(USER_ERROR_STATUS)
    if "LOCAL_RANK" in os.environ and LAUNCHER_PID in os.environ:
        with suppress(OSError, AttributeError):  # Linux only
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


def _system_sentence(error: Exception) -> str | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every program imports
        return ("the GPU's memory is not enough; use smaller batches (in training more --gradient-accumulation-steps "
                "leave the result as it is), or free what other programs hold.")  # fmt: skip
    if not isinstance(error, OSError):
        return None
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}; choose another path or change its permissions."
    return None


def _reported() -> bool:
    marker = os.environ.get(ERROR_MARKER)
    return bool(marker) and os.path.exists(marker)


def _report(sentence: str) -> None:
    marker = os.environ.get(ERROR_MARKER)
    try:
        if marker:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        print(sentence, file=sys.stderr)
    except FileExistsError:
        pass
    _leave(USER_ERROR_STATUS)


def _leave(status: int) -> None:
    """Exit; in a process group at once, because tearing it down waits for ranks that may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)
