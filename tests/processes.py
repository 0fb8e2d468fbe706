"""Running `main` of a program in forked copies of the test process (no start-up cost), alone or as a world."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable


def fork(work: Callable[[], None], output: str | os.PathLike | None = None) -> int:
    """Start `work` in a forked copy of this process and return its pid; its output goes to the file `output`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, kill_after: float | None = None) -> int:
    """Exit status of a forked process, negative for the signal that ended it; SIGKILL it after `kill_after` seconds."""
    end = time.monotonic() + (120 if kill_after is None else kill_after)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert kill_after is not None, "the forked process hung"
    return status


def run_main(main: Callable[[], None], arguments: list[str], world_size: int = 1, output=None) -> list[int]:
    """Run an entry point's `main` with a command line on `world_size` forked ranks; their exit statuses."""
    port = free_port()

    def as_rank(rank: int) -> Callable[[], None]:
        def work():
            from utils.program import run

            sys.argv = ["program", *map(str, arguments)]
            if world_size > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            run(main)

        return work

    pids = [fork(as_rank(rank), output) for rank in range(world_size)]
    return [wait(pid) for pid in pids]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
