"""For the tests of the samplers: tiny models with random weights, as files (4x4 codes, 16x16 pixels, 10 classes), and
processes that start fast.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.sample import sample_c2i_ddp
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.files import sha256
from utils.program import run

with torch.device("meta"):
    GPT_models["GPT-Tiny"]()  # imports what PyTorch leaves until the first use, for the processes forked after it

CODEBOOK, CLASSES, GRID, PIXELS = 64, 10, (4, 4), 16


def write_models(folder: Path) -> None:
    """`folder/vq.pt`, `folder/c2i_B_256.pt` (as our trainer writes them) and `folder/bare.pt` (a plain state dict)."""
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-Tiny"](codebook_size=CODEBOOK, codebook_embed_dim=4)
    torch.save({"model": tokenizer.state_dict()}, folder / "vq.pt")
    gpt = GPT_models["GPT-Tiny"](block_size=16, grid=GRID, num_classes=CLASSES, vocab_size=CODEBOOK)
    torch.nn.init.normal_(gpt.output.weight, std=0.3)
    state = gpt.state_dict()
    config = {
        "gpt_model": "GPT-Tiny",
        "image_size": PIXELS,
        "downsample_size": 4,
        "grid": list(GRID),
        "num_classes": CLASSES,
        "vocab_size": CODEBOOK,
        "class_names": [f"digit {i}" for i in range(CLASSES)],
        "tokenizer": {"name": "VQ-Tiny", "hash": sha256(folder / "vq.pt"), "weights": "raw"},
    }
    torch.save({"model": state, "steps": 7, "config": config}, folder / "c2i_B_256.pt")
    torch.save(state, folder / "bare.pt")


def flags(folder: Path, checkpoint: str = "c2i_B_256.pt", **changes) -> list[str]:
    """The samplers' command line for these models; `changes` by flag name, `None` to leave one out."""
    values = {
        "gpt-model": "GPT-Tiny",
        "gpt-ckpt": folder / checkpoint,
        "vq-model": "VQ-Tiny",
        "vq-ckpt": folder / "vq.pt",
        "codebook-size": CODEBOOK,
        "codebook-embed-dim": 4,
        "image-size": PIXELS,
        "downsample-size": 4,
        "num-classes": CLASSES,
        "cfg-scale": 2.0,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    line = []
    for name, value in values.items():
        line += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def start_sampler(arguments: list[str], output: Path, rank: int = 0, world_size: int = 1, port: int = 0):
    """Start the 50,000-image sampler in a process forked from one that has imported everything; returns the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sampling_models"])
    process = context.Process(target=_run_sampler, args=(arguments, output, rank, world_size, port))
    process.start()
    return process


def run_sampler(arguments: list[str], output: Path, world_size: int = 1) -> str:
    """Run it to its end on `world_size` processes and return what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_sampler(arguments, output, rank, world_size, port) for rank in range(world_size)]
    for process in processes:
        process.join()
    printed = output.read_text()
    assert [process.exitcode for process in processes] == [0] * world_size, printed
    return printed


def _run_sampler(arguments: list[str], output: Path, rank: int, world_size: int, port: int) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["sample_c2i_ddp", *arguments]
    run(sample_c2i_ddp.main)
