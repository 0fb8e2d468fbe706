"""One thread a process: tests are tiny, several run at once, and a process without a thread pool can be forked."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
