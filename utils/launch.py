"""torchrun, except that a mistake of the user ends in its one sentence and status 2 instead of a traceback.

Called by scripts/launch.sh with torchrun's own arguments; torchrun is the engine.
"""

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from utils.program import ERROR_MARKER, LAUNCHER_PID, USER_ERROR_STATUS


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="npp-launch-") as folder:
        marker = os.environ[ERROR_MARKER] = os.path.join(folder, "user-error")
        os.environ[LAUNCHER_PID] = str(os.getpid())
        quiet = lambda record: not os.path.exists(marker)  # noqa: E731
        for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
            logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(quiet)
        signal.signal(signal.SIGUSR1, _forward_to_workers)
        try:
            torchrun([handled_signals(), *meeting_address(sys.argv[1:])])
        except SignalException as stop:  # the workers have had their time to save
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            if os.path.exists(marker):
                sys.exit(USER_ERROR_STATUS)
            rank, failure = error.get_first_failure()
            print(f"error: rank {rank} (process {failure.pid}) ended with status {failure.exitcode}; "
                  "its own message is above.", file=sys.stderr)  # fmt: skip
            sys.exit(1)


def handled_signals() -> str:
    """torchrun's argument: the signals that stop it, without those that are ignored (nohup, jobs in the background)."""
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    return "--signals-to-handle=" + ",".join(stop.name for stop in stops if signal.getsignal(stop) != signal.SIG_IGN)


def meeting_address(arguments: list[str]) -> list[str]:
    """torchrun's `arguments`; with several nodes, also this node's address on the way to the first.

    Host names need not resolve to it (Debian maps a machine's own name to 127.0.1.1). Gloo is told its interface.
    """
    endpoints = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--rdzv-endpoint=")]
    if not endpoints:
        return arguments
    host, _, port = endpoints[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting sends nothing
        probe.connect((host, int(port)))
        address = probe.getsockname()[0]
        for _, interface in socket.if_nameindex():
            if _address_of(interface, probe) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return [f"--local-addr={address}", *arguments]


def _address_of(interface: str, probe: socket.socket) -> str | None:
    SIOCGIFADDR = 0x8915
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))[20:24])
    except OSError:  # no IPv4 address
        return None


def _forward_to_workers(number: int, _frame) -> None:
    """torchrun passes on SIGTERM and its like, but not SIGUSR1 (in training: save a checkpoint)."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), number)


if __name__ == "__main__":
    main()
