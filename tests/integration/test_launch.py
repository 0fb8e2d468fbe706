"""The shared launcher as users start it: several processes, several nodes, restarts, mistakes, other folders."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.tiny_training import NO_DROPOUT, command, rows, tiny_store
from utils.files import lock_folder
from utils.launch import Nodes, meet
from utils.program import ERROR_MARKER, LAUNCHER_PID, UserError

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
            [*inside, "bash", script, *map(str, arguments)],
            env=environment | ENVIRONMENT | variables,
            cwd=cwd,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


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
    """(commands that enter each node, name of the first): two network namespaces with their own addresses where they
    may be made (root, Linux), else this machine twice. The first resolves its own name to itself alone, as on Debian.
    """
    names = [f"npp{os.getpid()}-{node}" for node in (0, 1)]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add npp-v0 netns {names[0]} type veth peer name npp-v1 netns {names[1]}"]
    for node, name in enumerate(names):
        setup += [f"ip -n {name} addr add 10.99.0.{node + 1}/24 dev npp-v{node}"]
        setup += [f"ip -n {name} link set {device} up" for device in (f"npp-v{node}", "lo")]
    made = shutil.which("ip") and all(subprocess.run(c.split(), capture_output=True).returncode == 0 for c in setup)
    for name, address in zip(names if made else (), ("127.0.1.1", "10.99.0.1"), strict=False):
        hosts = Path("/etc/netns", name, "hosts")  # stands for /etc/hosts inside
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f"127.0.0.1 localhost\n{address} first-node\n")
    yield ([["ip", "netns", "exec", name] for name in names], "first-node") if made else ([(), ()], "127.0.0.1")
    for name in names if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def start_nodes(arguments, nodes, logs, **variables):
    """The same command on both nodes: their launchers, and a function that starts one of them."""
    enter, address = nodes
    variables |= {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}

    def start_node(rank: int):
        return start(arguments, logs[rank], inside=enter[rank], NODE_RANK=str(rank), **variables)

    return [start_node(0), start_node(1)], start_node


def kill(*processes) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_two_nodes_train_together_and_survive_the_loss_of_one(codes, two_nodes, tmp_path):
    """Two torchrun agents, one rendezvous; the second is killed with its worker and started again; the run ends."""
    arguments = command(codes, tmp_path, small=SMALL, no=NO_DROPOUT)
    logs = [tmp_path / "log0", tmp_path / "log1"]
    (first, second), start_node = start_nodes(arguments, two_nodes, logs)
    again: list = []
    try:
        wait_for(lambda: list(tmp_path.glob("run/checkpoints/*.pt")), first)
        for worker in workers_of(second.pid):
            os.kill(worker, signal.SIGKILL)
        os.killpg(second.pid, signal.SIGKILL)
        again.append(start_node(1))
        assert ended(first) == 0
        assert ended(again[0]) == 0
    finally:
        kill(first, second, *again)
    assert "continuing" in logs[0].read_text() + logs[1].read_text()
    assert rows(tmp_path)[-1]["step"] == 120


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_a_mistake_that_one_node_sees_ends_all_with_its_sentence(restarts, codes, two_nodes, tmp_path):
    arguments = command(codes, tmp_path, small=SMALL)
    (tmp_path / "run").mkdir()
    held = lock_folder(tmp_path / "run", "")  # only the main rank wants it
    logs = [tmp_path / "log0", tmp_path / "log1"]
    nodes, _ = start_nodes(arguments, two_nodes, logs, MAX_RESTARTS=restarts)
    try:
        for node, log in zip(nodes, logs, strict=True):
            assert ended(node) == 2
            assert log.read_text().count("error: ") == 1
            assert "Traceback" not in log.read_text()
            assert f"training in {tmp_path}/run; wait for it" in log.read_text()
    finally:
        kill(*nodes)
        held.close()


def interpreter(folder: Path, body: str) -> str:
    """A stand-in for the interpreter."""
    (folder / "python").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def launch(*arguments, script="launch.sh", **variables):
    """The launcher's end, with what it said."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= ENVIRONMENT | {name: str(value) for name, value in variables.items()}
    call = ["bash", ROOT / "scripts" / script, *map(str, arguments)]
    return subprocess.run(call, env=environment, text=True, capture_output=True, timeout=100)


def test_slurm_variables_make_the_same_world(tmp_path):
    """Under srun the launcher takes nodes, rank and first node from Slurm; python and scontrol stand in here."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "12345"}
    python = interpreter(tmp_path, 'env; echo "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("some.module", "--flag", **slurm, PATH=path, NPROC_PER_NODE=8, PYTHON=python)
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert Nodes.read(variables) == Nodes(2, 1, processes=8, restarts=0, first="node7", port=32345, job="12345")
    starter = ROOT / "scripts/run_module.py"
    assert done.stdout.splitlines()[-1] == f"{starter} utils.launch some.module --flag"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NPROC_PER_NODE": "x"}, "NPROC_PER_NODE must be a whole number from 1 to 1024, got x"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE must be a whole number from 1"),
        ({"NNODES": "-2"}, "NNODES must be a whole number from 1"),
        ({"NNODES": "9" * 5000}, "NNODES must be a whole number from 1"),
        ({"MAX_RESTARTS": "1.5"}, "MAX_RESTARTS must be a whole number from 0"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set; give the address of the first node"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK must be a whole number from 0 to 1, got 2"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number from 1 to"),
        ({"NNODES": "2", "MASTER_ADDR": "no such", "NODE_RANK": "1"}, "MASTER_ADDR no such is no address"),
        ({"SLURM_JOB_NODELIST": "a[1-", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}, "scontrol does not name the nodes"),
        (
            {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"},
            "starts several tasks per node; start",
        ),
        ({"PYTHON": "/nowhere/python"}, "there is no interpreter /nowhere/python"),
    ],
)
def test_nonsense_in_the_environment(variables, sentence):
    done = launch("some.module", **variables)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_nodes_that_do_not_come_and_a_port_that_is_taken(monkeypatch):
    monkeypatch.setattr("utils.launch.PATIENCE", 0.5)
    nodes = Nodes(2, 1, processes=1, restarts=0, first="127.0.0.1", port=free_port(), job="npp")
    with pytest.raises(UserError, match="the first node does not answer at 127.0.0.1:.*; check MASTER_ADDR"):
        meet(nodes)
    with pytest.raises(UserError, match="no other node has come to port"):
        meet(replace(nodes, rank=0))
    with socket.create_server(("", 0)) as taken:
        nodes = replace(nodes, rank=0, port=taken.getsockname()[1])
        with pytest.raises(UserError, match="in use.; give another MASTER_PORT"):
            meet(nodes)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert Nodes.read({"NPROC_PER_NODE": "8"}).processes == 8
    with pytest.raises(UserError, match="NPROC_PER_NODE is 9, but there are 8 GPUs"):
        Nodes.read({"NPROC_PER_NODE": "9"})


def test_a_mistyped_flag_is_said_once_and_not_restarted():
    done = launch("--epcohs", "3", script="autoregressive/train_c2i.sh", NPROC_PER_NODE=2)
    assert done.returncode == 2
    assert "error: unrecognized arguments: --epcohs 3; --help lists" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_said_once():
    for variables in ({"NPROC_PER_NODE": 2}, {"NNODES": 2}):
        done = launch("--help", script="autoregressive/train_c2i.sh", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("usage: ") == 1


def test_what_other_launchers_leave_in_the_environment(tmp_path):
    left = {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "PYTHONOPTIMIZE": 2}
    left |= {ERROR_MARKER: tmp_path / "left", LAUNCHER_PID: 1}
    shown = launch("some.module", **left, PYTHON=interpreter(tmp_path, "env")).stdout.splitlines()
    assert not [line for line in shown if line.split("=")[0] in left]


def test_an_interpreter_without_torch(tmp_path):
    venv.create(tmp_path / "bare")
    bare = tmp_path / "bare/bin/python"
    evaluator = subprocess.run([bare, ROOT / "evaluations/c2i/evaluator.py"], text=True, capture_output=True)
    for done in (launch(script="evaluate.sh", PYTHON=bare), launch("x", NPROC_PER_NODE=2, PYTHON=bare), evaluator):
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {bare} has no PyTorch; start programs by scripts/*.sh, which find .venv, activate it, or "
            "name an interpreter in the variable PYTHON.\n"
        )


def test_through_a_symlink_with_cdpath_set(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "weights.sh").symlink_to(ROOT / "scripts/download.sh")
    for call, folder in ((tmp_path / "weights.sh", "/"), ("scripts/download.sh", ROOT)):
        variables = os.environ | ENVIRONMENT | {"CDPATH": str(tmp_path)}
        done = subprocess.run(["bash", call], env=variables, cwd=folder, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("vq_ds16_c2i.pt")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_closed_pipe_ends_in_silence(processes):
    call = subprocess.Popen(
        ["bash", ROOT / "scripts/launch.sh", "pretrained_models.download"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | ENVIRONMENT | {"NPROC_PER_NODE": processes},
        text=True,
    )
    call.stdout.close()
    said = call.stderr.read()
    assert call.wait(60) == (141 if processes == "1" else 2)
    assert said == ""
