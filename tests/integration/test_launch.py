"""The shared launcher as users start it: several processes, several nodes, restarts, mistakes, other folders."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.tiny_training import NO_DROPOUT, command, rows, tiny_store

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = {"--epochs": 40, "--ckpt-every": 10, "--log-every": 30, "--warmup-epochs": 0}  # 120 steps


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


def start(arguments, log, cwd=None, inside=(), **variables):
    script = ROOT / "scripts/autoregressive/train_c2i.sh"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [*inside, "bash", script, *map(str, arguments)], env=environment | ENVIRONMENT | variables, cwd=cwd,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def ended(process, timeout=200) -> int:
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, process, timeout=100):
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the program ended early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def workers_of(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if b"train_c2i" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_from_any_folder_and_one_sentence_for_mistakes(codes, tmp_path):
    (tmp_path / "utils").mkdir()  # must not shadow the project's own package
    (tmp_path / "utils/__init__.py").write_text("raise ImportError('wrong utils')")
    for processes in ("1", "2"):
        log = tmp_path / f"log{processes}"
        assert ended(start(["--code-path", "missing"], log, cwd=tmp_path, NPROC_PER_NODE=processes)) == 2
        assert "error: there is no folder missing" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert log.read_text().count("error: ") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_is_restarted_and_the_run_goes_on(processes, codes, tmp_path):
    """SIGUSR1 saves; kill -9 of one of the workers: all are restarted and continue from that checkpoint."""
    arguments = command(codes, tmp_path, small=SMALL, rare={"--ckpt-every": 45})
    process = start(arguments, tmp_path / "log", NPROC_PER_NODE=str(processes))
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), process)  # step 30: it trains
    os.kill(process.pid, signal.SIGUSR1)  # all workers save, two at a multiple of ten steps
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/0*.pt")), process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    assert ended(process) == 0
    continued = re.search(r"continuing .* after step (\d+)", (tmp_path / "log").read_text())
    assert 30 < int(continued[1]) < 90
    assert processes == 1 or int(continued[1]) % 10 == 0
    undisturbed = command(codes, tmp_path / "undisturbed", small=SMALL)
    assert ended(start(undisturbed, tmp_path / "log2", NPROC_PER_NODE=str(processes))) == 0
    assert rows(tmp_path) == rows(tmp_path / "undisturbed")


def test_workers_do_not_outlive_a_killed_launcher(codes, tmp_path):
    """They would hold the run folder; the same command continues at once, and SIGTERM saves and ends with 143."""
    arguments = command(codes, tmp_path, small=SMALL | {"--epochs": 4000, "--ckpt-every": 5}, rare={})
    process = start(arguments, tmp_path / "log")
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/0*.pt")), process)
    worker = workers_of(process.pid)[0]
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and b"train_c2i" in Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)
    again = start(arguments, tmp_path / "log2")
    wait_for(lambda: "continuing" in (tmp_path / "log2").read_text(), again)
    again.terminate()
    assert ended(again) == 143
    assert "Traceback" not in (tmp_path / "log2").read_text()


def test_ignored_signals_stay_ignored(codes, tmp_path):
    """nohup protects a run: a hang-up of the launcher stops nothing."""
    process = start(command(codes, tmp_path, small=SMALL), tmp_path / "log", inside=["nohup"])
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), process)
    os.kill(process.pid, signal.SIGHUP)
    assert ended(process) == 0
    assert rows(tmp_path)[-1]["step"] == 120


@pytest.fixture
def two_nodes():
    """(commands that enter each node, address of the first): two network namespaces with their own addresses where
    they may be made (root, Linux), else this machine twice.
    """
    names = [f"npp{os.getpid()}-{node}" for node in (0, 1)]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add npp-v0 netns {names[0]} type veth peer name npp-v1 netns {names[1]}"]
    for node, name in enumerate(names):
        setup += [f"ip -n {name} addr add 10.99.0.{node + 1}/24 dev npp-v{node}"]
        setup += [f"ip -n {name} link set {device} up" for device in (f"npp-v{node}", "lo")]
    made = shutil.which("ip") and all(subprocess.run(c.split(), capture_output=True).returncode == 0 for c in setup)
    yield ([["ip", "netns", "exec", name] for name in names], "10.99.0.1") if made else ([(), ()], "127.0.0.1")
    for name in names if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_nodes_train_together_and_survive_the_loss_of_one(codes, two_nodes, tmp_path):
    """Two torchrun agents, one rendezvous; the second is killed with its worker and started again; the run ends."""
    enter, address = two_nodes
    arguments = command(codes, tmp_path, small=SMALL, no=NO_DROPOUT)
    variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    first = start(arguments, tmp_path / "log0", inside=enter[0], NODE_RANK="0", **variables)
    second = start(arguments, tmp_path / "log1", inside=enter[1], NODE_RANK="1", **variables)
    try:
        wait_for(lambda: list(tmp_path.glob("run/checkpoints/*.pt")), first)
        for worker in workers_of(second.pid):
            os.kill(worker, signal.SIGKILL)
        os.killpg(second.pid, signal.SIGKILL)
        again = start(arguments, tmp_path / "log1", inside=enter[1], NODE_RANK="1", **variables)
        assert ended(first) == 0
        assert ended(again) == 0
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "continuing" in (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert rows(tmp_path)[-1]["step"] == 120


def test_slurm_variables_make_the_same_world(tmp_path):
    """Under srun the launcher takes nodes, rank and first node from Slurm; python and scontrol stand in here."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in {"scontrol": "printf 'node7\\nnode8\\n'", "python": 'echo "$@"'}.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "12345"}
    environment = os.environ | slurm | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "NPROC_PER_NODE": "8",
                                        "PYTHON": str(bin_folder / "python")}  # fmt: skip
    launched = subprocess.run(["bash", ROOT / "scripts/launch.sh", "some.module", "--flag"], env=environment, text=True,
                              capture_output=True, check=True).stdout.split()  # fmt: skip
    assert launched[:2] == [str(ROOT / "scripts/run_module.py"), "utils.launch"]
    expected = {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=12345", "--rdzv-conf=is_host=0",
                "--rdzv-endpoint=node7:32345", "--rdzv-backend=c10d"}  # fmt: skip
    assert expected <= set(launched)
    assert launched[-3:] == [str(ROOT / "scripts/run_module.py"), "some.module", "--flag"]


def test_several_nodes_need_an_address():
    environment = os.environ | {"NNODES": "2", "NPROC_PER_NODE": "1"}
    environment.pop("MASTER_ADDR", None)
    refused = subprocess.run(["bash", ROOT / "scripts/launch.sh", "m"], env=environment, text=True, capture_output=True)
    assert refused.returncode == 2
    assert "MASTER_ADDR is not set" in refused.stderr
