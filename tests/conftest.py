"""One thread a process: tests are tiny, several run at once, and a process without a thread pool can be forked.

Tests run on the CPU, whose results they compare bit for bit; GPUs are hidden. Those that need one:
`NPP_TEST_GPU=1 pytest -k gpu`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.get("NPP_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)
# The first backward pass decides for good whether autograd gets threads, which forked processes could not use. Now it
# gets none; after some of what tests import (torch.export, compilers) it would.
torch.ones(1, requires_grad=True).sum().backward()
