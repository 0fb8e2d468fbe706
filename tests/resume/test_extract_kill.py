"""Extraction killed anywhere and started again gives the store of an uninterrupted run, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoregressive.train import extract_codes_c2i
from dataset import convert_codes
from tests.processes import fork, run_main, wait
from tests.tiny_extraction import arguments, contents, make_images, make_tokenizer
from utils.program import run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "autoregressive" / "extract_codes_c2i.sh"
RANDOM_KILLS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command line for a folder of codes, and the files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kill")
    data, tokenizer = make_images(folder / "images"), make_tokenizer(folder / "tiny.pt")
    assert run_main(extract_codes_c2i.main, arguments(data, folder / "straight", tokenizer)) == [0]
    return lambda codes, *more: arguments(data, codes, tokenizer, *more), contents(folder / "straight")


def start(command, output, before=lambda: None, main=extract_codes_c2i.main) -> int:
    def work():
        before()
        sys.argv = ["program", *map(str, command)]
        run(main)

    return fork(work, output)


@pytest.mark.slow
def test_killed_at_random_moments(made, tmp_path):
    command_for, straight = made
    command, log, rng = command_for(tmp_path / "codes"), tmp_path / "log", random.Random(0)
    began = time.monotonic()
    assert wait(start(command, log)) == 0
    duration = time.monotonic() - began
    shutil.rmtree(tmp_path / "codes")
    kills = finished = 0
    while kills < RANDOM_KILLS:
        status = wait(start(command, log), kill_after=rng.uniform(0, min(duration, 1.0)))
        if status == -signal.SIGKILL:
            kills += 1
            continue
        assert status == 0, log.read_text()
        assert contents(tmp_path / "codes") == straight
        shutil.rmtree(tmp_path / "codes")
        finished += 1
    assert wait(start(command, log)) == 0, log.read_text()
    assert contents(tmp_path / "codes") == straight


def die_at(call: int, late: bool):
    """Make `os.replace` and `os.rename` kill this process at their `call`-th use, before or after doing it."""
    calls = [0]

    def dying(original):
        def renaming(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args, **kwargs)
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)

        return renaming

    os.replace, os.rename = dying(os.replace), dying(os.rename)


def test_conversion_killed_around_every_rename(made, tmp_path):
    command_for, straight = made
    assert run_main(extract_codes_c2i.main, command_for(tmp_path / "codes")) == [0]
    packed, log = tmp_path / "codes" / "toy16_codes", tmp_path / "log"
    for late in (False, True):
        for call in range(1, 100):
            output = tmp_path / "published" / "toy16_codes"
            command = ["--codes", packed, "--output", output, "--layout", "published"]
            if wait(start(command, log, lambda: die_at(call, late), convert_codes.main)) == 0:  # noqa: B023
                assert call > 4
                break
            if not output.exists():
                assert wait(start(command, log, main=convert_codes.main)) == 0, log.read_text()
            back = ["--codes", output, "--output", tmp_path / "back" / "toy16_codes"]
            assert wait(start(back, log, main=convert_codes.main)) == 0, log.read_text()
            assert contents(tmp_path / "back") == {
                name: data for name, data in straight.items() if not name.endswith("places.json")
            }
            shutil.rmtree(tmp_path / "published")
            shutil.rmtree(tmp_path / "back")
        shutil.rmtree(tmp_path / "published")


@pytest.mark.parametrize("late", [True, False])
def test_killed_around_every_rename(made, tmp_path, late):
    """Each file and folder takes its name by a rename; the worst moments are just before and just after."""
    log, options = tmp_path / "log", ("--batch-size", "60")  # four blocks
    command_for, _ = made
    assert run_main(extract_codes_c2i.main, command_for(tmp_path / "straight", *options)) == [0]
    straight = contents(tmp_path / "straight")
    for call in range(1, 100):
        command = command_for(tmp_path / "codes", *options)
        if wait(start(command, log, lambda: die_at(call, late))) == 0:  # noqa: B023
            assert call > 11  # plan and its images, four blocks, a shard, labels, images, meta.json, the store
            return
        assert wait(start(command, log)) == 0, log.read_text()
        assert contents(tmp_path / "codes") == straight
        shutil.rmtree(tmp_path / "codes")


def test_killed_ranks_and_another_number_of_them(made, tmp_path):
    """Two ranks die after some blocks each, three go on."""
    command_for, straight = made
    command, log = command_for(tmp_path / "codes"), tmp_path / "log"

    def dying_main():
        die_at(4, late=True)
        extract_codes_c2i.main()

    assert run_main(dying_main, command, 2, log) == [-signal.SIGKILL] * 2
    assert (
        len(list((tmp_path / "codes" / "toy16_codes.partial" / "work").glob("block-*"))) == 5
    )  # rank 0 renames three other files first
    assert run_main(extract_codes_c2i.main, command, 3, log) == [0] * 3, log.read_text()
    assert contents(tmp_path / "codes") == straight


@pytest.mark.slow
def test_the_script_itself_killed_twice_and_finished_by_two_ranks(made, tmp_path):
    command_for, straight = made
    codes = tmp_path / "codes"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *command_for(codes, "--num-workers", "1")]
    work = codes / "toy16_codes.partial" / "work"
    for blocks in (2, 5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(work.glob("block-*.npz"))) < blocks:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)  # the launcher has become Python by exec: this is the program itself
        assert process.wait() == -signal.SIGKILL
        assert not (codes / "toy16_codes").exists()
    finish = subprocess.run(command, env=environment | {"NPROC_PER_NODE": "2"}, capture_output=True, text=True)
    assert finish.returncode == 0, finish.stderr
    assert "continuing: " in finish.stdout
    assert contents(codes) == straight
