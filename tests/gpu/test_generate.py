"""Decoding on a GPU: CUDA graphs repeat the golden generations without waiting or allocating."""

import pytest
import torch

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.parallel import ParallelCodeGenerator
from autoregressive.models.sampling import Sampling, gumbel_noise
from tests.golden_gpt import golden_model
from tests.unit.test_generate import FIGURES, LABELS, uniforms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_graphs_repeat_the_golden_generation_without_waiting(compile):
    generator = CodeGenerator(golden_model().cuda(), 3, 64, Sampling(2.0, 20, sample_logits=False), compile)
    labels, numbers = LABELS.cuda(), uniforms(3).cuda()
    assert generator(labels, numbers).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes = generator(labels, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - allocated < 10  # for a batch, not for its 64 tokens
    assert codes.tolist() == FIGURES["gen.cfg2.0.int20"].tolist()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("window", [3, 16])
def test_on_a_gpu_windows_repeat_the_golden_generation(compile, window):
    sampling = Sampling(2.0, 20, sample_logits=False)
    generator = ParallelCodeGenerator(golden_model().cuda(), 3, 64, sampling, window, compile)
    for _ in range(2):  # the second batch only replays
        assert generator(LABELS.cuda(), uniforms(3).cuda()).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()


@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_gumbel_draws_are_those_of_the_cpu(compile):
    sampling, numbers = Sampling(2.0, draw="gumbel"), uniforms(3)
    expected = CodeGenerator(golden_model(), 3, 64, sampling)(LABELS, numbers)
    on_gpu = [
        CodeGenerator(golden_model().cuda(), 3, 64, sampling, compile),
        ParallelCodeGenerator(golden_model().cuda(), 3, 64, sampling, 8, compile),
    ]
    for generator in on_gpu:  # float32 rounds differently there: a code changes only where two sums nearly tie
        codes = generator(LABELS.cuda(), numbers.cuda()).cpu()
        assert (codes == expected).double().mean() > 0.9
    numbers = numbers.flatten()
    torch.testing.assert_close(gumbel_noise(numbers.cuda(), 96).cpu(), gumbel_noise(numbers, 96), rtol=0, atol=1e-6)
