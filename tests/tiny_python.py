"""Stands in for the interpreter (`PYTHON`) of the project's scripts: shrinks the models, cuts the loops short.

`-m MODULE FLAGS…`, `run_module.py MODULE FLAGS…` or `FILE FLAGS…`; the variable TINY_FLAGS holds flags to append by
module, as JSON, and TINY_WEIGHTS the folder that stands for pretrained_models.
"""

import json
import os
import runpy
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from autoregressive.models import gpt
from pretrained_models import catalogue
from tokenizer.tokenizer_image import vq_model


def tiny_tokenizer(multiples):
    small = {"channels": 8, "z_channels": 8, "num_res_blocks": 1, "norm_groups": 4}
    shape = {"encoder_ch_mult": multiples, "decoder_ch_mult": multiples}
    return lambda **settings: vq_model.VQModel(vq_model.ModelArgs(**(small | shape | settings)))


def shrink() -> None:
    for name in gpt.GPT_SIZES:
        gpt.GPT_SIZES[name] = (1 if name == "GPT-Tiny" else 2, 2, 32)
    vq_model.VQ_models["VQ-16"] = tiny_tokenizer([1, 1, 1, 1, 1])
    vq_model.VQ_models["VQ-Tiny"] = tiny_tokenizer([1, 1, 1])
    catalogue.FOLDER = Path(os.environ.get("TINY_WEIGHTS", catalogue.FOLDER))


if __name__ == "__main__":
    shrink()
    if sys.argv[1] == "-u":  # torchrun passes it
        del sys.argv[1]
    if sys.argv[1] == "-m" or Path(sys.argv[1]).name == "run_module.py":
        module = sys.argv[2]
        flags = [] if "--dry-run" in sys.argv else json.loads(os.environ.get("TINY_FLAGS", "{}")).get(module, [])
        sys.argv = [module, *sys.argv[3:], *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
