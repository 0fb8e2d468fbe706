"""A real Slurm on this machine, two nodes: the batch script of docs/training.md stops, is requeued and goes on.

Skipped without Slurm (Debian: apt-get install --no-install-recommends slurm-wlm).
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.tiny_training import command, rows, tiny_store

ROOT = Path(__file__).parents[2]
SMALL = {"--epochs": 200, "--ckpt-every": 30, "--log-every": 5, "--warmup-epochs": 0}  # 600 steps
CONFIGURATION = """
ClusterName=npp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not shutil.which("slurmctld") or not shutil.which("slurmd"), reason="Slurm is not installed"),
]


@pytest.fixture
def slurm():
    """A function that runs a client of a cluster of two nodes and returns what it says."""
    host = socket.gethostname()
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip("this machine's name has no address")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: sockets in it must have paths of 107 bytes at most
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), ports=ports)
    )
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MAX_RESTARTS": "0"}

    def client(*words) -> str:
        done = subprocess.run(list(map(str, words)), env=environment, cwd=ROOT, text=True, capture_output=True)
        return done.stdout + done.stderr

    daemons = []
    for name, *call in (("ctl", "slurmctld"), ("0", "slurmd", "-N", host), ("1", "slurmd", "-N", f"{host}-2")):
        with open(folder / f"{name}.out", "wb") as output:
            daemons.append(subprocess.Popen([*call, "-D"], env=environment, stdout=output, stderr=output))
        time.sleep(0.5)
    wait_for(lambda: client("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", lambda: client("sinfo", "-N", "-l"), 30)
    yield client
    client("scancel", "--user", getpass.getuser())
    wait_for(lambda: not client("squeue", "-h").strip(), lambda: client("squeue"), 60)
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)
    shutil.rmtree(folder)


def wait_for(condition, said, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


def documented_script(arguments: list[str], output: Path) -> str:
    """The batch script of the guide for these arguments; of its resources only the number of nodes."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    assert script.count(" …") == 1
    script = re.sub(r"#SBATCH --gpus-per-node=.*\n", f"#SBATCH --cpus-per-task=1 --output={output}\n", script)
    return script.replace(" …", " " + " ".join(arguments))


def test_a_job_is_stopped_requeued_and_goes_on(slurm, tmp_path):
    results, output = tmp_path / "results", tmp_path / "output"
    arguments = command(tiny_store(tmp_path / "codes"), results, x=SMALL)
    (tmp_path / "job.sh").write_text(documented_script(arguments, output))
    job = re.search(r"job (\d+)", slurm("sbatch", tmp_path / "job.sh"))[1]

    def said():
        return (output.read_text() if output.exists() else "") + slurm("scontrol", "show", "job", job)

    wait_for(lambda: (results / "run/metrics.jsonl").exists(), said)  # it trains
    slurm("scancel", "--signal=TERM", job)  # what --signal=TERM@300 does before the time limit
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), said)
    stopped = int(re.search(r"stopped by a signal after step (\d+)", output.read_text())[1])
    assert 0 < stopped < 600
    wait_for(lambda: slurm("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", said)  # nothing is left of its steps
    # Slurm itself waits two minutes: in the second in which it revoked a job's credential it cannot start it again.
    time.sleep(2)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), said)
    assert f"continuing {results}/run after step {stopped}" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert rows(results)[-1]["step"] == 600
