"""Starts a module in several processes or on several nodes: torchrun, with a say in how programs end.

`python scripts/run_module.py utils.launch MODULE [ARGUMENTS…]`, called by scripts/launch.sh, whose variables it obeys.
A mistake of the user ends all processes of all nodes in its one sentence and status 2, without restarts.
"""

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main as torchrun

from utils.program import ERROR_MARKER, LAUNCHER_PID, USER_ERROR_STATUS, UserError, run, user_error_reported

PATIENCE = 600  # seconds to wait for the other nodes: torchrun's own
POLL = 0.2  # seconds
FIRST_ADDRESS, USER_ERROR = "npp/first-address", "npp/user-error"  # in the store that all nodes share
STARTER = str(Path(__file__).parents[1] / "scripts/run_module.py")


@dataclass(frozen=True)
class Nodes:
    """What the environment says about where the processes are; raises `UserError` for nonsense."""

    count: int
    rank: int
    processes: int  # per node
    restarts: int
    first: str  # the first node's name or address
    port: int
    job: str

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> "Nodes":
        count = _whole_number(variables, "NNODES", 1, 1, 100_000)
        nodes = cls(
            count=count,
            rank=_whole_number(variables, "NODE_RANK", 0, 0, count - 1) if count > 1 else 0,
            processes=_whole_number(variables, "NPROC_PER_NODE", 1, 1, 1024),
            restarts=_whole_number(variables, "MAX_RESTARTS", 0, 0, 1_000_000),
            first=variables.get("MASTER_ADDR", ""),
            port=_whole_number(variables, "MASTER_PORT", 29500, 1, 65535) if count > 1 else 0,
            job=variables.get("SLURM_JOB_ID") or "npp",
        )
        if count > 1 and not nodes.first:
            raise UserError(f"NNODES is {count} but MASTER_ADDR is not set; give the address of the first node.")
        if 0 < torch.cuda.device_count() < nodes.processes:
            raise UserError(f"NPROC_PER_NODE is {nodes.processes}, but there are {torch.cuda.device_count()} GPUs.")
        return nodes


def _whole_number(variables: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = variables.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {text}.")
    return int(text)


def main() -> None:
    nodes = Nodes.read(os.environ)
    store, address = meet(nodes) if nodes.count > 1 else (None, None)
    if address and (interface := interface_of(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(-(-cores // nodes.processes)))  # its share for each process
    with tempfile.TemporaryDirectory(prefix="npp-launch-") as folder:
        marker = Path(folder) / "user-error"
        os.environ |= {ERROR_MARKER: str(marker), LAUNCHER_PID: str(os.getpid())}
        signal.signal(signal.SIGUSR1, lambda number, _frame: signal_workers(number))
        for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
            logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(lambda record: not marker.exists())
        arguments = [*torchrun_arguments(nodes, address), STARTER, *sys.argv[1:]]
        over = threading.Event()
        watcher = threading.Thread(target=end_all_at_a_user_error, args=(marker, store, over))
        watcher.start()
        try:
            status = run_torchrun(arguments, over, several_nodes=nodes.count > 1)
        finally:
            watcher.join()
    sys.exit(status)


def torchrun_arguments(nodes: Nodes, address: str | None) -> list[str]:
    if nodes.count == 1:
        rendezvous = ["--standalone", "--local-addr=127.0.0.1"]  # not this machine's name, which may resolve to nothing
    else:
        endpoint = f"{nodes.first if nodes.rank else '127.0.0.1'}:{nodes.port}"
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-conf=is_host=0"]
        rendezvous += [f"--rdzv-id={nodes.job}", f"--local-addr={address}"]
    counts = [f"--nnodes={nodes.count}", f"--nproc-per-node={nodes.processes}", f"--max-restarts={nodes.restarts}"]
    # The signals that stop it, without those that are ignored (nohup, jobs in the background).
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handled = [stop.name for stop in stops if signal.getsignal(stop) != signal.SIG_IGN]
    return [f"--signals-to-handle={','.join(handled)}", *counts, *rendezvous]


def run_torchrun(arguments: list[str], over: threading.Event, several_nodes: bool) -> int:
    """Sets `over` at its end; returns the status to exit with."""
    try:
        try:
            torchrun(arguments)
            return 0
        finally:
            over.set()
    except SignalException as stop:  # the workers have had their time to save
        return USER_ERROR_STATUS if user_error_reported() else 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reason = f"rank {rank} (process {failure.pid}) ended with status {failure.exitcode}; its own message is above"
    except RendezvousError as error:
        reason = f"the nodes have lost each other ({error}); start all of them again"
    if user_error_reported(several_nodes):
        return USER_ERROR_STATUS
    print(f"error: {reason}.", file=sys.stderr)
    return 1


def end_all_at_a_user_error(marker: Path, store: TCPStore | None, over: threading.Event) -> None:
    """A thread that waits for a user error, of this node (in the file `marker`) or of another (in `store`)."""
    while not _content(marker) and not over.wait(POLL):
        try:
            if store is not None and store.check([USER_ERROR]):
                sentence = store.get(USER_ERROR).decode()
                marker.write_text(sentence)
                sys.stderr.write(sentence)
        except DistError:  # the first node is gone; torchrun will notice
            store = None
    if not (sentence := _content(marker)):
        return
    if store is not None:
        with suppress(DistError):
            store.set(USER_ERROR, sentence)
    signal_workers(signal.SIGKILL)  # they wait for each other; what they have to save is saved
    if store is not None:
        time.sleep(10 * POLL)  # the first node has the store: the others must have read it
    while not over.is_set():  # torchrun may lose a signal, which is an exception to it
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(5)
        signal_workers(signal.SIGKILL)


def _content(marker: Path) -> str:
    return marker.read_text() if marker.exists() else ""


def signal_workers(number: int) -> None:
    """torchrun passes on SIGTERM and its like, but not SIGUSR1 (in training: save a checkpoint)."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                os.kill(int(child), number)


def meet(nodes: Nodes) -> tuple[TCPStore, str]:
    """The store that all nodes share, kept by the first; and this node's address for the others.

    A node's own name need not resolve to it (Debian maps it to 127.0.1.1), so each takes the address of its connection
    to the first, and the first the one at which another has found it.
    """
    timeout = timedelta(seconds=60)
    try:
        if nodes.rank == 0:
            store = TCPStore("127.0.0.1", nodes.port, is_master=True, timeout=timeout)
            _wait(lambda: store.check([FIRST_ADDRESS]), f"no other node has come to port {nodes.port} of this one")
            return store, store.get(FIRST_ADDRESS).decode()
        own, first = _wait(lambda: _connection(nodes), f"the first node does not answer at {nodes.first}:{nodes.port}")
        store = TCPStore(first, nodes.port, is_master=False, timeout=timeout)
        store.set(FIRST_ADDRESS, first)
        return store, own
    except DistError as error:
        raise UserError(
            f"the nodes cannot meet at port {nodes.port} of {nodes.first} ({str(error).splitlines()[0]}); "
            "give another MASTER_PORT to all of them."
        ) from error


def _connection(nodes: Nodes) -> tuple[str, str] | None:
    """This node's address and the first's, of a connection between them; None where nobody listens."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(10)
            probe.connect((nodes.first, nodes.port))
            return probe.getsockname()[0], probe.getpeername()[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR {nodes.first} is no address ({error}); give the first node's.") from error
    except OSError:
        return None


def _wait(condition: Callable, refusal: str):
    """The first true value of `condition()`; raises `UserError(refusal)` when `PATIENCE` is at its end."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end:
            raise UserError(f"{refusal}; check MASTER_ADDR and MASTER_PORT, and start all nodes together.")
        time.sleep(POLL)
    return value


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address, for Gloo, which would ask the node's name for it."""
    SIOCGIFADDR = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


if __name__ == "__main__":
    run(main)
